"""The test hub answers unmodified huggingface_hub as the real one does."""

import pytest
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError


@pytest.fixture
def repo_id(hub, request):
    name = f"tester/{request.node.name.replace('_', '-')}"
    HfApi().create_repo(name)
    return name


def test_uploaded_folder_comes_back_byte_for_byte(hub, repo_id, tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_text('{"a": 1}')
    (source / "sub" / "weights.safetensors").write_bytes(bytes(range(256)) * 50_000)
    HfApi().upload_folder(repo_id=repo_id, folder_path=source, commit_message="both kinds of file")

    target = snapshot_download(repo_id, local_dir=tmp_path / "target")

    for path in ("config.json", "sub/weights.safetensors"):
        assert (source / path).read_bytes() == (tmp_path / "target" / path).read_bytes(), target
    assert "both kinds of file" in hub.repos["models", repo_id].messages


def test_creating_a_repo_twice_needs_exist_ok(repo_id):
    assert HfApi().create_repo(repo_id, exist_ok=True).repo_id == repo_id
    with pytest.raises(Exception, match="already created"):
        HfApi().create_repo(repo_id)


def test_missing_things_raise_the_errors_of_the_real_hub(repo_id):
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("tester/nowhere", "config.json")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo_id, "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo_id, "config.json", revision="v9")


def test_branches_and_tags_keep_their_files(repo_id):
    api = HfApi()
    api.upload_file(repo_id=repo_id, path_or_fileobj=b"old", path_in_repo="note.txt")
    api.create_tag(repo_id, tag="v1")
    api.create_branch(repo_id, branch="dev")
    api.upload_file(repo_id=repo_id, path_or_fileobj=b"new", path_in_repo="note.txt", revision="dev")

    def read(revision):
        with open(hf_hub_download(repo_id, "note.txt", revision=revision), "rb") as file:
            return file.read()

    assert [read(revision) for revision in ("v1", "main", "dev")] == [b"old", b"old", b"new"]
    assert {branch.name for branch in api.list_repo_refs(repo_id).branches} == {"main", "dev"}


def test_listing_and_deleting_files(repo_id):
    api = HfApi()
    api.upload_file(repo_id=repo_id, path_or_fileobj=b"x", path_in_repo="a/b.txt")
    api.upload_file(repo_id=repo_id, path_or_fileobj=b"y", path_in_repo="c.txt")
    api.delete_file("c.txt", repo_id=repo_id)

    assert api.list_repo_files(repo_id) == ["a/b.txt"]
    assert [entry.path for entry in api.list_repo_tree(repo_id)] == ["a"]
    assert [entry.path for entry in api.get_paths_info(repo_id, ["a/b.txt", "c.txt"])] == ["a/b.txt"]


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ("base_model: /home/a/model", "with value .*/home/a/model.* is not valid"),
        ("model-index: [{name: a, results: [{task: {type: b}, dataset: {type: c}, metrics: []}]}]", "lacks name in"),
    ],
)
def test_a_card_with_metadata_that_the_hub_refuses_is_refused(hub, metadata, sentence):
    card = f"---\n{metadata}\n---\n".encode()
    with pytest.raises(ValueError, match=sentence):
        HfApi().upload_file(repo_id="tester/refused", path_or_fileobj=card, path_in_repo="README.md")


def test_model_card_is_validated_and_pushed(hub, repo_id):
    ModelCard("---\nlicense: apache-2.0\n---\n# Card\n").push_to_hub(repo_id)

    assert b"# Card" in hub.files(repo_id)["README.md"]


def test_writing_without_a_token_is_refused(repo_id):
    with pytest.raises(Exception, match="401"):
        HfApi(token=False).upload_file(repo_id=repo_id, path_or_fileobj=b"x", path_in_repo="a.txt")
