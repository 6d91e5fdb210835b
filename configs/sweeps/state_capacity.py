"""How much does a recurrent state hold? The protocol of Stuffed Mamba (arXiv:2410.07145), scaled down.

Command: ``python -m tools.launch --sweep=configs/sweeps/state_capacity.py:cpu --workdir=studies/capacity``
Presets: smoke (2 state sizes x 3 lengths, few steps, minutes), passkey (T_recall alone, 5 sizes x 2 seeds, an
    hour on a core), cpu (5 x 6 and that, many hours on 2 cores), full (up to 16K tokens, three seeds, a GPU).
T_forget: Mamba-2 of configs/lm_stdlib.py with another d_state, trained on rows of T tokens of a stream, each
    from an empty state (the paper carries states over 12 rows); then read at 64 T (state_collapse).
T_recall: the small model of configs/passkey_stdlib.py with such states; in full the large one. The longest
    context with keys found (passkey).
Tokens a batch: the same at every length. Learning rates: a grid at the shortest length of each state size.
"""

from configs.study import Arm, Examination, Study

TOKENS = 4096  # a batch
LONG = 64  # rows in which forgetting is looked for, in training lengths


def get_study(preset: str = "smoke") -> Study:
    """Raises ValueError for a preset that does not exist."""
    if preset == "smoke":
        short = {"train.steps": 200, "train.eval_every": 0, "task.eval_batches": 8, "checkpoint.every": 0}
        arms = _forget((8, 32), (64, 128, 256), (1.0,), (0,), short, TOKENS, rows=2)
        short |= {"task.haystack.growth_steps": 100}
        arms += _recall("small", (8, 32), (512,), (1.0,), (0,), short, 2 * TOKENS)
    elif preset in ("passkey", "cpu"):
        sizes: tuple[int, ...] = (4, 8, 16, 32, 64)
        arms, lengths = [], (64, 128, 256, 512, 1024, 2048)
        if preset == "cpu":
            arms = _forget(sizes, lengths, (0.5, 1.0), (0,), {}, TOKENS, rows=8)
        steps = {"train.steps": 2000, "task.haystack.growth_steps": 1000}
        arms += _recall("small", sizes, (512,), (1.0,), (0, 1), steps, 2 * TOKENS)
    elif preset == "full":
        sizes, tokens, more = (4, 8, 16, 32, 64, 128), 32 * TOKENS, {"train.steps": 20_000}
        lengths = tuple(2**k for k in range(6, 15))
        arms = _forget(sizes, lengths, (0.3, 1.0, 3.0), (0, 1, 2), more, tokens, rows=32)
        more |= {"task.haystack.growth_steps": 10_000}
        arms += _recall("mamba2", sizes, lengths[3:], (0.3, 1.0, 3.0), (0, 1, 2), more, tokens)
    else:
        raise ValueError(f"configs/sweeps/state_capacity.py:{preset}: use smoke, passkey, cpu or full")
    return Study(
        name=f"state_capacity:{preset}",
        question=(
            "How long must a text be for a model to learn to forget, and how long may it be for one number "
            "in it to be found again, as a function of the size of the recurrent state?"
        ),
        analysis="state_capacity",
        arms=tuple(arms),
    )


def _forget(sizes, lengths, rates, seeds, overrides, tokens, rows) -> list[Arm]:
    quiet = {"train.baselines": False, "train.sample_length": 0, "task.packing": "stream"}
    settings = (f"state_collapse.factor={LONG}.0", f"state_collapse.rows={rows}")
    return [
        Arm(
            name=f"forget_N{d_state}_T{length}",
            config="configs/lm_stdlib.py:mamba2",
            overrides=quiet
            | {"model.mamba2.d_state": d_state, "task.seq_len": length, "task.batch_size": tokens // length}
            | overrides,
            factors={"measures": "forget", "d_state": d_state, "length": length},
            rates=rates,
            rate_of="" if length == lengths[0] else f"forget_N{d_state}_T{lengths[0]}",
            seeds=seeds,
            examinations=(Examination(("state_collapse",), settings),),
        )
        for d_state in sizes
        for length in lengths
    ]


def _recall(variant, sizes, lengths, rates, seeds, overrides, tokens) -> list[Arm]:
    settings = (
        'passkey.styles=["stuffed_mamba"]',
        "passkey.factors=[0.5, 1.0, 2.0, 4.0, 8.0]",
        "passkey.samples=8",
        "passkey.noise=sentences",
    )
    return [
        Arm(
            name=f"recall_N{d_state}_T{length}",
            config=f"configs/passkey_stdlib.py:{variant},{d_state}",
            overrides={
                "train.baselines": False,
                "train.sample_length": 0,
                "task.seq_len": length,
                "task.batch_size": tokens // length,
                "task.eval_seq_len": 4 * length,
                "task.eval_batch_size": max(tokens // (4 * length), 1),
            }
            | overrides,
            factors={"measures": "recall", "d_state": d_state, "length": length},
            rates=rates,
            rate_of="" if length == lengths[0] else f"recall_N{d_state}_T{lengths[0]}",
            metric=f"haystack_{length}/exact_match",
            best="max",
            seeds=seeds,
            examinations=(Examination(("passkey",), settings),),
        )
        for d_state in sizes
        for length in lengths
    ]
