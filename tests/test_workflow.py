"""What the workflow under .github asks of the project: its targets, its folders, its versions."""

import re
import shlex
from pathlib import PurePosixPath

import pytest
import yaml
from conftest import ROOT
from packaging.specifiers import SpecifierSet

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings its twin
    import tomli as tomllib

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text("utf-8"))
JOBS = WORKFLOW["jobs"]


def steps(*jobs):
    return [step for job in jobs or JOBS for step in JOBS[job]["steps"]]


def uses(action, *jobs):
    """The steps of these jobs that use an action, whatever its version."""
    return [step for step in steps(*jobs) if step.get("uses", "").partition("@")[0] == action]


def make_targets(script):
    """What a shell script asks make for."""
    lines = [shlex.split(line, comments=True) for line in script.splitlines()]
    calls = [words[1:] for words in lines if words[:1] == ["make"]]
    return {word for call in calls for word in call if "=" not in word}


def asked(*jobs):
    return make_targets("\n".join(step.get("run", "") for step in steps(*jobs)))


def main_branch():
    return yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["branch"]


def test_it_runs_on_pull_requests_and_on_main():
    triggers = WORKFLOW[True]  # YAML 1.1 reads the key `on` as true
    assert set(triggers) == {"push", "pull_request"}
    assert triggers["push"] == {"branches": [main_branch()]}
    assert triggers["pull_request"] is None


def test_every_target_is_one_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):(?!=)", MAKEFILE, re.MULTILINE))
    assert asked()
    assert asked() <= targets


def test_it_asks_for_all_that_a_change_must_pass():
    needed = make_targets((ROOT / ".ci" / "run").read_text("utf-8"))
    assert {"test", "book"} <= needed
    assert needed <= asked("build")
    assert asked("versions") == {"test"}


def test_make_takes_the_python_that_was_set_up():
    assert WORKFLOW["env"]["PYTHON"] == "python"
    assert re.search(r"^PYTHON \?=", MAKEFILE, re.MULTILINE)
    for job in ("build", "versions"):
        places = [list(step) for step in steps(job)]
        (setup,) = (i for i, step in enumerate(steps(job)) if step in uses("actions/setup-python"))
        assert setup < min(i for i, keys in enumerate(places) if "run" in keys)


def test_the_versions_of_python_are_ones_that_the_project_takes():
    with (ROOT / "pyproject.toml").open("rb") as file:
        taken = SpecifierSet(tomllib.load(file)["project"]["requires-python"])
    (setup,) = uses("actions/setup-python", "build")
    versions = [setup["with"]["python-version"], *JOBS["versions"]["strategy"]["matrix"]["python"]]
    assert len(set(versions)) == 3
    for version in versions:
        assert isinstance(version, str), f"{version} needs quotes: as a number, 3.10 is 3.1"
        assert version in taken
    assert any(taken == SpecifierSet(f">={version}") for version in versions)  # the oldest is tried
    (setup,) = uses("actions/setup-python", "versions")
    assert setup["with"]["python-version"] == "${{ matrix.python }}"


def test_what_it_uploads_is_where_the_makefile_puts_the_book():
    (index,) = re.findall(r"^BOOK := (.+)$", MAKEFILE, re.MULTILINE)
    (upload,) = uses("actions/upload-pages-artifact")
    assert upload["with"]["path"] == str(PurePosixPath(index).parent)
    order = steps("build")
    assert order.index(upload) > max(i for i, step in enumerate(order) if "run" in step)


def test_only_main_is_published_and_only_what_was_built():
    deploy = JOBS["deploy"]
    (publish,) = uses("actions/deploy-pages")
    assert publish in deploy["steps"]
    assert deploy["needs"] == "build"
    conditions = set(deploy["if"].split(" && "))
    assert conditions == {"github.event_name == 'push'", f"github.ref == 'refs/heads/{main_branch()}'"}
    assert deploy["permissions"] == {"pages": "write", "id-token": "write"}
    assert deploy["environment"]["name"] == "github-pages"
    assert deploy["environment"]["url"] == f"${{{{ steps.{publish['id']}.outputs.page_url }}}}"
    assert deploy["concurrency"]["group"]


def test_nothing_but_publishing_may_write():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert [name for name, job in JOBS.items() if "permissions" in job] == ["deploy"]


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_a_time_limit(job):
    assert 0 < JOBS[job]["timeout-minutes"] <= 60


@pytest.mark.parametrize("action", sorted({step["uses"] for step in steps() if "uses" in step}))
def test_every_action_has_a_version(action):
    assert re.fullmatch(r"[\w-]+/[\w./-]+@(v\d+(\.\d+)*|[0-9a-f]{40})", action)
