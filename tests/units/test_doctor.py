"""pallas_kernels.doctor: what it says of right, wrong and refusing implementations, and of the real ops."""

import importlib
import json
import pathlib
import pkgutil

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import doctor
from pallas_kernels.dispatch import PREFERENCE, Kernel, resolve
from pallas_kernels.examples import Example, examples


def triple(x):
    return 3 * x


@jax.custom_vjp
def wrong_gradient(x):
    return 3 * x


wrong_gradient.defvjp(lambda x: (3 * x, None), lambda _, dy: (2 * dy,))


def broken(x):
    raise TypeError("out of order\nand more")


def odd(x):
    return None if x.shape[0] % 2 else f"L = {x.shape[0]} is even; use {x.shape[0] + 1}"


def never(x):
    return "it is Sunday; come back on Monday"


AVAILABLE = {
    "reference": triple,
    "xla": lambda x: x + x + x,
    "pallas_tpu": Kernel(triple, odd, "tpu", automatic=True),
    "pallas_gpu": Kernel(triple, odd, "cuda"),
    "interpret": Kernel(triple, odd),
    "sunday": Kernel(triple, never),
    "wrong": Kernel(wrong_gradient, odd),
    "broken": Kernel(broken, odd),
}


def example(length):
    def call(arrays, implementation):
        return resolve("op", implementation, AVAILABLE)(arrays["x"])

    return Example("op", f"L = {length}", AVAILABLE, call, {"x": jnp.arange(1.0, length + 1)})


def test_implementations_beside_the_reference():
    calls = [example(2), example(3)]
    checks = {name: doctor.check(name, calls) for name in AVAILABLE if name != "reference"}
    assert {name: c.status for name, c in checks.items()} == {
        "xla": "equal",
        "pallas_tpu": "elsewhere",
        "pallas_gpu": "elsewhere",
        "interpret": "equal",
        "sunday": "refuses",
        "wrong": "differs",
        "broken": "fails",
    }
    assert checks["xla"].example == "L = 2" and checks["interpret"].example == "L = 3"
    assert checks["wrong"].values == 0 and checks["wrong"].gradients == pytest.approx(1 / 3)
    assert checks["broken"].note == "TypeError: out of order"
    assert checks["sunday"].note == never(None)
    # These kernels are no Pallas calls, which is what lowering them would show.
    assert checks["pallas_gpu"].lowers == "no" and "no mosaic_gpu in the lowered" in checks["pallas_gpu"].note
    assert [name for name, c in checks.items() if not c.good] == [
        "pallas_tpu",
        "pallas_gpu",
        "wrong",
        "broken",
    ]


def test_what_none_gets_and_why(monkeypatch):
    def chosen(length, platform):
        choice = doctor.choose(example(length), platform)
        return choice.implementation, choice.why, choice.good

    assert chosen(3, "cpu") == ("xla", "no kernel for it", True)
    assert chosen(3, "tpu") == ("pallas_tpu", "expected, but not in the lowered program", False)
    assert chosen(2, "tpu") == ("xla", "pallas_tpu: L = 2 is even; use 3", True)
    not_run = "not yet run on hardware, so by name only: implementation='pallas_gpu'"
    assert chosen(3, "cuda") == ("xla", not_run, True)
    assert chosen(2, "cuda") == ("xla", "pallas_gpu: L = 2 is even; use 3", True)
    monkeypatch.setenv(PREFERENCE, "interpret")
    assert chosen(3, "tpu") == ("interpret", f"${PREFERENCE}", True)
    assert chosen(2, "tpu") == ("xla", "interpret: L = 2 is even; use 3", True)
    assert "doctor" not in AVAILABLE


def test_every_op_has_an_example():
    folder = pathlib.Path(pallas_kernels.__file__).parent
    found = []
    for module in pkgutil.iter_modules([str(folder)]):
        if module.ispkg:
            op = importlib.import_module(f"pallas_kernels.{module.name}")
            found += [d for name, d in vars(op).items() if name.endswith("IMPLEMENTATIONS")]
    covered = [e.available for e in examples()]
    missing = [sorted(d) for d in found if not any(d is c for c in covered)]
    assert found and not missing, f"add a call to pallas_kernels/examples.py for the op with {missing}"


def test_the_command_on_a_real_op(capsys, monkeypatch):
    assert doctor.main(["--ops=linear_scan", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["good"] and {c["op"] for c in found["checks"]} == {"linear_scan"}
    assert {(c["platform"], c["implementation"]) for c in found["choices"]} >= {
        ("cpu", "xla"),
        ("cuda", "xla"),
    }
    checks = [doctor.Check("op", "xla", "differs", "[call]", 1.0, float("nan"), 1e-4, 2.0)]
    monkeypatch.setattr(doctor, "examine", lambda ops, note: (checks, [doctor.choose(example(3), "tpu")]))
    assert doctor.main([]) == 1
    assert "NOT all right" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        doctor.main(["--ops=conv"])
    assert "'conv' is unknown; use some of ssd," in capsys.readouterr().err
