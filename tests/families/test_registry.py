"""The tables of families and hybrids can be read without torch."""

import subprocess
import sys


def test_tables_import_neither_torch_nor_transformers():
    code = (
        "import sys, rwkvinside.families.registry, rwkvinside.modeling.registry, rwkvinside.config.teacher_lookup\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
