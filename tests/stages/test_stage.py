"""What all stages write alike: metrics of parts, headlines, contact sheets, the guidance's state."""

import numpy as np
import pytest
import torch

from stages.parallel import StepParts
from stages.stage import add_metrics, contact_sheet, cover_headline, guidance_state, load_guidance_state


def test_metrics_of_parts_add_up_to_their_mean_by_share():
    totals = {"start": 3.0}
    add_metrics(totals, {"cover": 0.2, "t": 1.0}, 0.25)
    add_metrics(totals, {"cover": 0.6}, 0.75)
    assert totals == pytest.approx({"start": 3.0, "cover": 0.5, "t": 0.25})


def test_equal_parts_cover_every_view_once_in_order():
    assert [list(range(6)[part.slice]) for part in StepParts(6, 3)] == [[0, 1], [2, 3], [4, 5]]
    assert [list(range(4)[part.slice]) for part in StepParts(4, 1)] == [[0, 1, 2, 3]]


def test_a_headline_names_what_there_is():
    assert cover_headline({"cover": 0.314}) == "cover 31 %"
    assert cover_headline({"cover": 0.5, "agreement_db": 12.34, "clip": 27.31}) == (
        "cover 50 %, agreement 12.3 dB, CLIP 27.3"
    )


def test_a_contact_sheet_has_a_row_for_every_batch():
    dark, bright = torch.zeros(3, 2, 4, 3), torch.full((3, 2, 4, 3), 0.5)
    bright[2] = 1
    sheet = contact_sheet([dark, bright])
    assert sheet.shape == (4, 12, 3) and sheet.dtype == np.uint8
    assert (sheet[:2] == 0).all() and (sheet[2:, :8] == 128).all() and (sheet[2:, 8:] == 255).all()


def test_a_guidances_state_goes_into_a_stages_and_back():
    class Guide:
        def __init__(self):
            self.state = {"score.w": torch.ones(2)}

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    state = guidance_state(Guide())
    assert list(state) == ["guidance.score.w"]
    other = Guide()
    load_guidance_state(other, {"field.w": torch.zeros(1), "guidance.score.w": torch.zeros(2)})
    assert list(other.state) == ["score.w"] and not other.state["score.w"].any()


def test_a_stage_that_only_finishes_has_no_guidance_to_save():
    assert guidance_state(None) == {}
    load_guidance_state(None, {"guidance.generator": torch.zeros(1)})
