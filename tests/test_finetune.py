"""Fine-tuning: the loss and its gradients beside transformers', documents and their targets, resuming, what is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import CASES, ROOT, TINY_GEMMA, copy_tiny_gemma, tiny_config

import finetune
from checkpoint import open_checkpoint, sources
from finetune import Objective, Ranks, Trainer, add_adapters, whole_model
from generate import load_model
from ops.training import IGNORED, by_torch, cross_entropy
from tokenizer import open_tokenizer
from training_data import Data, Document, documents_of, pack

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def documents(*lengths: int, vocab: int = 128, seed: int = 0) -> list[Document]:
    """Random ones, of whose tokens about two of three are targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]
    learned = [(torch.rand(n, generator=generator) < 0.7).tolist() for n in lengths]
    from array import array

    return [Document(array("i", t), bytes(m)) for t, m in zip(tokens, learned)]


def objective_of(directory, recompute: bool = True) -> Objective:
    model = whole_model(open_checkpoint(directory), ALONE, torch.float32)
    return Objective(model, by_torch(CPU), torch.float32, recompute)


def gradients_of(objective: Objective) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in objective.model.named_parameters() if p.grad is not None}


def backward(objective: Objective, *batches) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of batches and its gradients."""
    objective.zero_grad()
    total = 0.0
    for batch in batches:
        loss = objective(batch)
        loss.backward()
        total += loss.item()
    return total, gradients_of(objective)


def assert_close(found: dict, expected: dict, rtol: float):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(found[name], gradient, rtol=0, atol=rtol * scale + 1e-12), name


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def test_loss_and_gradients_are_those_of_transformers(reference):
    """A row of three documents, longer than the windows, against transformers' model on each of them alone."""
    their_model, directory = reference
    # Recomputing changes nothing, so that it is on in all of these tests but that of itself
    objective, rows = objective_of(directory), documents(23, 9, 11)
    loss, found = backward(objective, Data(rows, 48).batch([rows], CPU))
    their_model.zero_grad()
    total = 0.0
    for document in rows:
        tokens = torch.tensor(document.tokens)
        logits = their_model(tokens[None]).logits[0, :-1].float()
        targets = torch.where(torch.tensor(list(document.learned), dtype=torch.bool), tokens, IGNORED)[1:]
        total = total + F.cross_entropy(logits, targets, reduction="sum")
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    theirs, config = dict(their_model.named_parameters()), objective.model.config
    expected = {}
    for name, parts in sources(config).items():
        if name.endswith(".scalar"):
            continue
        expected[name] = torch.cat([theirs[their_name].grad for their_name, _ in parts])
    their_model.zero_grad()
    assert_close(found, expected, 1e-4)
