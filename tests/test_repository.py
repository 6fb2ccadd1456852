"""Files for those who carry on: workflows, forms of issues, what the package says of itself."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
FORMS = [path for path in FORMS if path.name != "config.yml"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands(workflow: Any, job: str) -> list[str]:
    return [step["run"] for step in workflow["jobs"][job]["steps"] if "run" in step]


def test_every_file_of_yaml_is_one():
    found = [*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    assert len(found) > len(WORKFLOWS) + len(FORMS) > 4
    assert all(isinstance(read(path), dict) for path in found)


def test_a_push_and_a_pull_request_run_what_a_submission_has_to_pass():
    workflow = read(GITHUB / "workflows" / "ci.yml")
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML takes the key `on` for a truth
    assert commands(workflow, "run") == ["bash .ci/run"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_write_only_where_they_have_to(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    writing = [name for name, job in workflow["jobs"].items() if "permissions" in job]
    assert writing == (["release"] if path.name == "release.yml" else [])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_take_the_torch_of_the_makefile(path):
    (pinned,) = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for job in read(path)["jobs"].values():
        made = [
            step for step in job.get("steps", ()) if re.search("make|run$", step.get("run", ""))
        ]
        if made:
            assert job["env"]["TORCH"] == f"{pinned}+cpu"


def test_the_matrix_of_releases_is_nox_s():
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    (releases,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RELEASES"
    ]
    job = read(GITHUB / "workflows" / "releases.yml")["jobs"]["nox"]
    wanted = [{"torch": torch, "python": python} for torch, (_, python) in releases.items()]
    assert job["strategy"]["matrix"]["include"] == wanted


def test_a_tag_releases_what_was_checked():
    jobs = read(GITHUB / "workflows" / "release.yml")["jobs"]
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml" and jobs["release"]["needs"] == "ci"
    first, *_, last = commands(read(GITHUB / "workflows" / "release.yml"), "release")
    assert first == "make release-check" and last.startswith("gh release create")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_ask_for_the_environment(path):
    fields = {field["id"]: field for field in read(path)["body"]}
    assert "natten env" in fields["environment"]["attributes"]["label"]
    assert fields["environment"]["validations"]["required"]


def test_a_pull_request_says_on_which_hardware_it_was_tested():
    text = (GITHUB / "pull_request_template.md").read_text(encoding="utf-8")
    assert "Hardware" in text and "natten env" in text and ".ci/run" in text


def test_the_package_names_the_authors_and_papers_of_the_citation():
    citation = read(ROOT / "CITATION.cff")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (authors,) = re.findall(r'^authors = \[\{ name = "(.*)" \}\]$', text, re.M)
    assert [{"name": authors}] == citation["authors"]
    urls = re.findall(r'^"[^"]+" = "(https?://[^"]+)"$', text, re.M)
    assert urls == [paper["url"] for paper in citation["references"]]


def test_the_readme_cites_the_papers_of_the_citation():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for paper in read(ROOT / "CITATION.cff")["references"]:
        authors = [f"{each['family-names']}, {each['given-names']}" for each in paper["authors"]]
        for value in (paper["title"], " and ".join(authors), str(paper["year"]), paper["url"]):
            assert re.search(rf"= \{{{re.escape(value)}\}},?$", text, re.M), value
