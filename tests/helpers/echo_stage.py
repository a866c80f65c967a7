"""A foreign objective, as somebody would add one: cross-entropy on every text, for the mixers alone."""

from rwkvinside.stages.base import Stage, StageSize


class Echo(Stage):
    objective = "echo"
    small = large = StageSize("256", 32, 128)

    @classmethod
    def defaults(cls, width, max_positions):
        return super().defaults(width, max_positions) | {"train": ["mixer"], "optim": {}}

    @classmethod
    def learning_rates(cls, width):
        return {"lr": 1e-3, "lr_rest": 1e-3, "lr_final": 1e-4}

    def step(self, model, teacher, plan, sample):
        from rwkvinside.stages.steps import SftStep

        return SftStep()
