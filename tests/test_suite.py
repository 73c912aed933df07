"""What the suite does for all of its tests: processes that share them, and their cache."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
TESTS = ["a.py::one", "a.py::two", "a.py::three", "b.py::one", "c.py::one", "c.py::two", "c.py::three", "c.py::four"]


class Worker:
    """A process of the suite that is told which tests to run."""

    shutting_down = False

    def __init__(self, name):
        self.gateway, self.tests = SimpleNamespace(id=name), []

    def send_runtest_some(self, indices):
        self.tests += [TESTS[index] for index in indices]

    def shutdown(self):
        self.shutting_down = True


@pytest.fixture
def make_scheduler(request):
    pytest.importorskip("xdist")
    plugins = request.config.pluginmanager.get_plugins()
    conftest = next(plugin for plugin in plugins if getattr(plugin, "__file__", None) == str(CONFTEST))

    def make(dist):
        config = SimpleNamespace(
            option=SimpleNamespace(dist=dist, loadscopereorder=True), getvalue=lambda name: ["popen"] * 2
        )
        return conftest.pytest_xdist_make_scheduler(config, None)

    return make


def test_a_module_stays_in_one_process_and_modules_in_their_order(make_scheduler):
    scheduler, workers = make_scheduler("load"), [Worker("one"), Worker("other")]
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, TESTS)
    scheduler.schedule()
    assert workers[0].tests == TESTS[:3]
    assert workers[1].tests == TESTS[3:]  # of one test alone it would have to wait for the next


def test_another_way_to_share_the_tests_can_be_asked_for(make_scheduler):
    assert make_scheduler("worksteal") is None


def test_no_test_reads_what_another_run_of_the_suite_kept():
    folder = Path(os.environ["PIPELINE_CACHE"])
    assert folder.name.startswith("pipeline-cache-") and folder.is_dir()
