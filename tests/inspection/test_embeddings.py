"""Projections of token embeddings, and nearest neighbours."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection import responses
from nanovllm.inspection.embeddings import nearest, neighbors, pca, project
from nanovllm.inspection.observe import InspectedModel
from tests.support.checkpoints import write_checkpoint
from tests.support.family_tokenizers import llama2


def test_components_are_those_of_the_covariance_matrix() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * [9, 5, 1, 1, 1, 1]
    points, explained = pca(rows.astype(np.float32), 2)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    np.testing.assert_allclose(explained, values[[-1, -2]] / values.sum(), rtol=1e-4)
    expected = (rows - rows.mean(axis=0)) @ vectors[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-3)


def test_the_sign_of_a_component_does_not_depend_on_the_library() -> None:
    rows = np.array([[0, 0], [1, 3], [2, 6]], dtype=np.float32)
    points, _ = pca(rows, 1)
    assert (np.diff(points[:, 0]) > 0).all()


def test_extra_tokens_are_projected_once(model: InspectedModel) -> None:
    projection = project(model, "pca", 10, extra_ids=[200, 3, 200])
    assert projection.token_ids == (*range(10), 200)
    assert projection.points.shape == (11, 2)
    assert len(project(model, "pca", 5000).token_ids) == model.config.vocab


@pytest.mark.parametrize("limit", [2, 5001])
def test_the_number_of_points_is_limited(model: InspectedModel, limit: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"limit is {limit} but must be 3 to 5000"):
        project(model, "pca", limit)


def test_tsne_keeps_neighbours_together(model: InspectedModel) -> None:
    pytest.importorskip("sklearn")
    projection = project(model, "tsne", 60)
    assert projection.explained is None
    np.testing.assert_array_equal(project(model, "tsne", 60).points, projection.points)
    assert np.ptp(projection.points, axis=0).min() > 0


def test_tsne_without_its_package_names_the_remedy(
    model: InspectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(InvalidRequestError, match="pip install scikit-learn, or use pca"):
        project(model, "tsne", 10)


def test_tsne_is_offered_where_its_package_is_installed(
    model: InspectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, methods in ((None, ["pca"]), (ModuleSpec("sklearn", None), ["pca", "tsne"])):
        monkeypatch.setattr("importlib.util.find_spec", lambda _, found=package: found)
        assert responses.run(model, "embeddings", {"limit": 3})["methods"] == methods


def test_neighbours_have_the_largest_cosines(model: InspectedModel) -> None:
    table = model.weights.token_embedding.astype(np.float64)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosines = unit @ unit[7]
    cosines[7] = -1
    found = neighbors(model, 7, 5)
    assert [token_id for token_id, _ in found] == np.argsort(-cosines)[:5].tolist()
    np.testing.assert_allclose(
        [cosine for _, cosine in found], np.sort(-cosines)[:5] * -1, atol=1e-5
    )
    assert [token_id for token_id, _ in nearest(model, [3, 7], 5)[1]] == [i for i, _ in found]
    with pytest.raises(InvalidRequestError, match="count is 101"):
        neighbors(model, 7, 101)
    with pytest.raises(InvalidRequestError, match="token id 999 is not"):
        neighbors(model, 999)


def test_the_neighbors_of_a_text_are_those_of_its_token_alone(tmp_path: Path) -> None:
    """Not those of the token that the tokenizer puts before a text."""
    family = llama2()
    write_checkpoint(family.write(tmp_path), config={"vocab_size": family.tokenizer.vocab})
    inspected = InspectedModel.load(tmp_path)
    answer = responses.run(inspected, "neighbors", {"text": "the"})
    ids = family.library.get_vocab()
    assert answer["token"] == {"id": ids["▁the"], "text": " the"}
    part = inspected.token(ids["<0xE4>"])
    assert part["bytes"] == "e4"
    assert inspected.undecodable_bytes(answer["token"]["id"]) is None
