"""Rows of a stateful stage, to train on and to validate on."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from plans import stage_plan
from stores import token_store

from rwkvinside.data.rows import ContinuedRows
from rwkvinside.data.sources import Mixture
from rwkvinside.errors import UserError
from rwkvinside.evaluate.in_training import share
from rwkvinside.stages.rows import judged_streams, rows_of, validation_batches

SEQ_LEN, STEP_ROWS = 8, 3


@pytest.fixture
def store():
    texts = [np.arange(begin, end, dtype=np.uint32) for begin, end in ((0, 70), (70, 75), (75, 133), (133, 150))]
    return token_store(texts, 149)


def plan(ranks=1, stateful=True, **settings):
    optim = {"lr": 1e-3, "lr_rest": 1e-3, "lr_final": 1e-4, "warmup_steps": 1}
    shape = {"data": {"seq_len": SEQ_LEN}, "batch": {"tokens": STEP_ROWS * SEQ_LEN}, "loss": {"kl": 0, "ce": 1}}
    made = stage_plan(objective="pretrain", tokens=96, train=[".*"], optim=optim, stateful=stateful, **shape | settings)
    return replace(made, run=replace(made.run, ranks=ranks))


def test_the_streams_of_a_step_are_its_rows(store):
    rows = rows_of(plan(), store)
    assert isinstance(rows, ContinuedRows) and rows.streams == STEP_ROWS
    anew = rows_of(plan(stateful=False), store)
    for i in range(3 * STEP_ROWS):  # the same tokens
        assert anew.row(i)["input_ids"].tolist() == rows.row(i)["input_ids"].tolist()
        assert anew.row(i)["position_ids"][0] == 0 and bool(rows.row(i)["position_ids"][0]) == (i >= STEP_ROWS)
    with pytest.raises(UserError, match="rows of a mixture do not go on"):
        rows_of(plan(), Mixture(("a", "b"), (store, store), (0.5, 0.5)))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_validates_on_streams_that_go_on_and_every_target_counts_once(store, ranks):
    made = plan(ranks)
    batches = validation_batches(made, store, 4096)
    streams = judged_streams(made)
    assert streams == STEP_ROWS and len(batches) % ranks == 0
    targets = Counter()
    for rank in range(ranks):
        before, own = {}, share(batches, rank, ranks)
        for batch in own:
            for row, ids, goes_on in zip(batch.rows, batch.input_ids, batch.goes_on, strict=True):
                stream = row % streams
                assert not goes_on or before[stream] == ids[0] - 1
                before[stream] = int(ids[-1])
            targets.update(batch.labels[batch.labels != -100].tolist())
        assert any(batch.goes_on.any() for batch in own)
        alone = validation_batches(plan(), store, 4096)
        assert {row for batch in own for row in batch.rows} <= {row for batch in alone for row in batch.rows}
    assert targets == Counter(set(range(150)) - {0, 70, 75, 133})
