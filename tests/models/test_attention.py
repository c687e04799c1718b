"""Attention over trees is a dense softmax under `visible`, forward and backward; the masks say the same in every form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhf_cli.data.trees import Batch, Piece, build_batch, visible
from rlhf_cli.models.attention import additive_mask, block_mask, tree_attention
from tests.models.tiny_backbone import draw_trees

DIM = 4


def _begun() -> Batch:
    """Two rows whose trees begin alike, of 1 to 3 branches, and one with a single tree."""
    trees = [*draw_trees(2, branches=3, system=17), *draw_trees(2, seed=1, system=17), *draw_trees(2, seed=2, branches=2)]
    pieces = [Piece(i, tuple(range(len(tree.responses)))) for i, tree in enumerate(trees)]
    return build_batch(trees, [[pieces[2], pieces[0], pieces[3]], [pieces[1], pieces[2]], [pieces[4], pieces[5]]])


def _batch() -> Batch:
    """Three rows: several trees with 1 to 4 branches, a tree without a prompt, padding of different lengths."""
    trees = [
        *draw_trees(2, branches=3),
        *draw_trees(2, seed=1),
        *draw_trees(1, seed=2, branches=4),
        *draw_trees(1, seed=3, branches=2),
    ]
    trees[5] = trees[5]._replace(prompt=trees[5].prompt[:0], supervised=trees[5].supervised[:0])
    pieces = [Piece(i, tuple(range(len(tree.responses)))) for i, tree in enumerate(trees)]
    return build_batch(trees, [[pieces[0], pieces[2]], [pieces[1], pieces[3], pieces[5]], [pieces[4]]])


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """(R, L, H, D) by the definition."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (torch.einsum("rhid,rhjd->rhij", query, key) * scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("rhij,rhjd->rihd", scores.softmax(-1), value)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("made", [_batch, _begun])
def test_tree_attention_is_a_dense_softmax_under_visible(
    made: Callable[[], Batch], heads: tuple[int, int], window: int | None
) -> None:
    batch = made()
    rows, length = batch.ids.shape
    generator = torch.Generator().manual_seed(0)
    real = batch.tree >= 0
    upstream = torch.randn(rows, length, heads[0], DIM, generator=generator) * real[:, :, None, None]
    inputs = [torch.randn(rows, n, length, DIM, generator=generator) for n in (heads[0], heads[1], heads[1])]
    found = []
    for ours in (True, False):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        if ours:
            out, _ = tree_attention(torch.nn.Module(), q, k, v, None, segments=batch.segments, scaling=0.3, sliding_window=window)
        else:
            out = _dense(q, k, v, visible(batch, window), 0.3)
        (out * upstream).sum().backward()
        found.append((out * real[:, :, None, None], q.grad, k.grad, v.grad))
    for a, b in zip(*found, strict=True):
        assert float((a - b).detach().abs().max()) < 1e-5


def test_padding_gets_zeros() -> None:
    batch = _batch()
    rows, length = batch.ids.shape
    q = torch.randn(rows, 2, length, DIM)
    out, _ = tree_attention(torch.nn.Module(), q, q, q, None, segments=batch.segments)
    assert int((batch.tree < 0).sum()) > 0
    assert float(out[batch.tree < 0].abs().max()) == 0
    assert float(out[batch.tree >= 0].abs().amin((1, 2)).max()) > 0


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"softcap": 30.0}])
def test_what_it_has_not_it_refuses(options: dict[str, float]) -> None:
    q = torch.randn(1, 2, 4, DIM)
    with pytest.raises(NotImplementedError, match="tree attention has neither dropout nor softcap"):
        tree_attention(torch.nn.Module(), q, q, q, None, segments=(), **options)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("made", [_batch, _begun])
def test_the_masks_say_the_same(made: Callable[[], Batch], window: int | None) -> None:
    batch = made()
    seen = visible(batch, window)
    additive = additive_mask(batch, window, torch.float32)
    assert torch.equal(additive == 0, seen)
    assert set(additive[~seen].tolist()) == {torch.finfo(torch.float32).min}
    rows, length = batch.ids.shape
    rule = block_mask(batch, window, torch.float32).mask_mod
    index = torch.arange(length)
    b = torch.arange(rows)[:, None, None]
    assert torch.equal(rule(b, torch.tensor(0), index[None, :, None], index[None, None, :]), seen[:, 0])
