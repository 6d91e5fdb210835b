"""The loss of a classifier and its gradient are the same on every mesh, batch statistics included."""

import pytest

from configs.classification import ClassificationExperiment
from models.config import ClassifierConfig
from runtime.mesh import MeshConfig
from runtime.optimizer import OptimConfig
from tasks.classification import ClassificationTaskConfig
from tasks.lra.config import LRADataConfig
from tests.laws.test_lm import assert_same, loss_and_gradient


def experiment(tmp_path_factory, mesh):
    """Every kind of sub-layer once, on expressions of different lengths."""
    data = LRADataConfig(name="listops", seq_len=32, train_size=8, validation_size=8, test_size=8, workers=0)
    data.cache_dir = str(tmp_path_factory.getbasetemp() / "lra")
    data.listops.min_length, data.listops.max_length, data.listops.max_depth = 5, 30, 4
    model = ClassifierConfig(
        classes=10, vocab_size=18, d_model=16, pattern="DSdsMm*-", read_both_ways="Mm", norm="batch"
    )
    model.s4d.d_state = model.s4.d_state = model.dss.d_state = model.s5.d_state = model.mamba2.d_state = 4
    model.s4d.bidirectional = model.s4.bidirectional = model.s5.bidirectional = True
    model.s4.l_max = model.dss.max_kernel_length = 32
    model.mamba2.headdim, model.mamba.d_state, model.mlp.hidden = 8, 4, 32
    model.attention.num_heads, model.attention.causal = 4, False
    return ClassificationExperiment(
        model=model,
        task=ClassificationTaskConfig(data=data, batch_size=8),
        optim=OptimConfig(),
        mesh=mesh,
    )


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return loss_and_gradient(experiment(tmp_path_factory, MeshConfig(1)))


@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 1, 2, 4)], ids=str)
def test_loss_is_the_same_on_every_mesh(tmp_path_factory, one_device, shape):
    assert_same(loss_and_gradient(experiment(tmp_path_factory, MeshConfig(*shape))), one_device)
