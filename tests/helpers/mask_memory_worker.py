"""How much memory a forward of one packed row of 16,384 tokens takes, by documents and by a mask; one line of JSON.

Prints bytes on top of what was resident before each of the two, of a teacher so small that little else counts.
"""

import json

import torch
from hybrid_cases import attention_mask_4d, packed, teacher

from rwkvinside.support.process_memory import forget_peak, peak_bytes
from rwkvinside.teacher.signals import TeacherModel


def taken(run) -> int:
    assert forget_peak()
    before = peak_bytes()
    with torch.no_grad():
        run()
    return peak_bytes() - before


if __name__ == "__main__":
    lm = teacher(layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    batch = packed([1024] * 16)
    model = TeacherModel(lm)
    model(packed([8, 8]))  # loads what is used first
    by_documents = taken(lambda: model(batch))
    by_mask = taken(lambda: lm.model(input_ids=batch.input_ids, attention_mask=attention_mask_4d(batch)))
    print(json.dumps({"documents": by_documents, "mask": by_mask}))
