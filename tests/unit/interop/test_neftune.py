"""Noise on the embeddings while training."""

import pytest
import torch
from torch import nn

from trainwright.interop.neftune import activate, deactivate, input_embedding


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.first, self.second = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, ids):
        return self.first(ids)


IDS = torch.arange(8).reshape(2, 4)


def test_the_noise_is_bounded_by_alpha_over_the_root_of_length_times_width():
    model = Tokens().train()
    before = model(IDS)
    activate(model, 5.0)
    torch.manual_seed(0)
    noise = torch.stack([model(IDS) - before for _ in range(200)])
    bound = 5.0 / (4 * 4) ** 0.5  # seq 4, dim 4
    assert 0.95 * bound < noise.abs().max() <= bound + 1e-6
    assert abs(noise.mean()) < 0.05 * bound  # its standard error is 0.7 % of the bound


def test_there_is_none_in_evaluation_or_after_it_was_taken_off():
    model = Tokens().train()
    before = model(IDS)
    handle = activate(model, 5.0)
    assert not torch.equal(model(IDS), before)
    assert torch.equal(model.eval()(IDS), before)
    deactivate(model.train(), handle)
    assert torch.equal(model(IDS), before) and not hasattr(model.first, "neftune_noise_alpha")


def test_the_embedding_is_the_one_the_model_names_or_its_first():
    model = Tokens()
    assert input_embedding(model) is model.first
    model.get_input_embeddings = lambda: model.second
    assert input_embedding(model) is model.second
    model.get_input_embeddings = lambda: None
    assert input_embedding(model) is model.first


def test_a_model_without_embeddings_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    words = r"neftune_noise_alpha.*Sequential has no nn\.Embedding, only \['Linear', 'ReLU'\].*get_input_embeddings"
    with pytest.raises(ValueError, match=words):
        activate(model, 5.0)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_of_whole_samples_is_a_sequence_of_one(kind):
    model = nn.Sequential(kind(9, 4), nn.Linear(4, 1)).train()
    ids = torch.arange(8) if kind is nn.Embedding else torch.arange(16).reshape(8, 2) % 9
    before = model[0](ids)
    activate(model, 5.0)
    torch.manual_seed(0)
    noise = torch.stack([model[0](ids) - before for _ in range(200)])
    bound = 5.0 / 4**0.5  # dim 4
    assert 0.95 * bound < noise.abs().max() <= bound + 1e-6


def test_a_model_that_cannot_name_its_embedding_is_searched():
    class Images(Tokens):
        def get_input_embeddings(self):
            raise NotImplementedError

    model = Images()
    assert input_embedding(model) is model.first
