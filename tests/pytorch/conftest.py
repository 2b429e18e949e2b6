"""What the tests of torch's machinery run over."""

from __future__ import annotations

import pytest
from torch._dynamo.utils import counters

from tests.support.backends import Backend
from tests.support.cases import LogprobsCase
from tests.support.forms import FORMS
from tests.support.subjects import SUBJECTS, Subject


@pytest.fixture
def case(backend: Backend) -> LogprobsCase:
    return FORMS["everything"]().to(backend.device)


@pytest.fixture(autouse=True)
def _fresh_counters() -> None:
    counters.clear()


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]
