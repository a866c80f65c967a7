"""Which layers should keep attention: measured scores, and the best choice under constraints."""
