"""Resources that the published FHIR models accept, with codes that mean what is told."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from engine import messages as m

pytest.importorskip("fhir.resources")

from fhir.resources import detectedissue as issue_r5
from fhir.resources import observation as observation_r5
from fhir.resources.R4B import detectedissue as issue_r4b
from fhir.resources.R4B import observation as observation_r4b

from engine.fhir import Export

NOON = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
VALUES = {
    "heart_rate_bpm": 61.5,
    "respiratory_rate_per_minute": 14.0,
    "spo2_percent": 97.0,
    "systolic_mmhg": 121.0,
    "temperature_celsius": 36.9,
    "news2": 1.0,
    "sdnn_ms": 48.2,
    "rmssd_ms": 33.25,
    "pnn50": 0.125,
    "quality": 2.0,  # nothing that a record of health would hold
}
# Of LOINC and SNOMED CT by their own pages, not by the exporter's table.
CODES = {
    "Heart rate": ["8867-4"],
    "Respiratory rate": ["9279-1"],
    "Oxygen saturation in arterial blood by pulse oximetry": ["2708-6", "59408-5"],
    "Systolic blood pressure": ["8480-6"],
    "Body temperature": ["8310-5"],
    "NEWS2 total score": ["1104051000000101"],
    "R-R interval standard deviation (SDNN)": ["80404-7"],
}
ALERT = m.Alert(
    "bed-7",
    "asystole",
    "active",
    "high",
    4.1,
    4.0,
    3600,
    10.0,
    3690,
    subject="k3v9x7q2",
    onset=2124,
)


def measures(seconds: float, values: dict[str, float]) -> m.Measures:
    return m.Measures("bed-7", round(360 * seconds), seconds, round(360 * seconds) + 90, values)


def told(export: Export, message: m.Message) -> list[dict[str, Any]]:
    return [json.loads(text) for text in export.resources(message)]


@pytest.mark.parametrize(("release", "model"), [("R4B", observation_r4b), ("R5", observation_r5)])
def test_measures_are_observations_that_the_library_accepts(release: Any, model: Any) -> None:
    found = told(Export(release, now=lambda: NOON), measures(10.0, VALUES))
    assert len(found) == len(VALUES) - 1
    for fields in found:
        model.Observation.model_validate(fields)
        assert fields["resourceType"] == "Observation"
        assert fields["status"] == "preliminary"
        assert fields["note"] == [{"text": m.NOTICE}]
        coding = fields["code"].get("coding", [])
        assert [each["code"] for each in coding] == CODES.get(fields["code"]["text"], [])
    assert {fields["code"]["text"] for fields in found} > set(CODES)
    rate = found[0]
    assert rate["valueQuantity"] == {
        "value": 61.5,
        "unit": "/min",
        "system": "http://unitsofmeasure.org",
        "code": "/min",
    }
    assert datetime.fromisoformat(rate["issued"]) == NOON
    seen = datetime.fromisoformat(rate["effectiveDateTime"])
    assert (NOON - seen).total_seconds() == 0.25


@pytest.mark.parametrize(
    ("release", "model", "whose"), [("R4B", issue_r4b, "patient"), ("R5", issue_r5, "subject")]
)
def test_alerts_are_detected_issues_of_one_episode(release: Any, model: Any, whose: str) -> None:
    export = Export(release, now=lambda: NOON)
    resolved = m.Alert(
        *[getattr(ALERT, name) for name in ("stream", "rule")],
        "resolved",
        "high",
        1.0,
        4.0,
        7200,
        20.0,
        7200,
        subject="k3v9x7q2",
        onset=2124,
    )
    found = told(export, ALERT) + told(export, resolved)
    for fields in found:
        model.DetectedIssue.model_validate(fields)
        assert fields["status"] == "preliminary"
        assert fields["severity"] == "high"
        assert fields[whose]["identifier"]["value"] == "k3v9x7q2"
        assert m.NOTICE in fields["detail"]
    assert found[0]["identifier"] == found[1]["identifier"]
    assert [fields["detail"].split(";")[0] for fields in found] == [
        "asystole: active",
        "asystole: resolved",
    ]


def test_what_nobody_would_read_elsewhere_is_not_told() -> None:
    export = Export("R5")
    pending = m.Alert("s", "asystole", "pending", "high", 4.1, 4.0, 0, 0.0, 0)
    beat = m.Beat("s", 0, 0.0, "N", 1.0, 0, None)
    assert told(export, pending) == told(export, beat) == []
    assert told(export, measures(1.0, {"quality": 2.0})) == []


def test_each_measure_is_told_once_in_so_many_seconds_of_its_stream() -> None:
    export = Export("R5", every_s=60.0)
    times = [t for t in range(200) if told(export, measures(float(t), {"heart_rate_bpm": 60.0}))]
    assert times == [0, 60, 120, 180]
    assert len(told(export, measures(181.0, {"heart_rate_bpm": 60.0, "sdnn_ms": 50.0}))) == 1
    assert told(export, measures(3.0, {"heart_rate_bpm": 60.0}))  # the stream was opened anew


def test_whose_they_are_and_when_it_was_may_be_said() -> None:
    (unknown,) = told(Export("R5"), measures(0.0, {"heart_rate_bpm": 60.0}))
    assert unknown["subject"]["identifier"] == {"system": "urn:x-murmur:stream", "value": "bed-7"}
    export = Export("R5", "k3v9x7q2", start=NOON)
    (known,) = told(export, measures(90.0, {"heart_rate_bpm": 60.0}))
    assert known["subject"]["identifier"] == {"system": "urn:x-murmur:subject", "value": "k3v9x7q2"}
    assert (datetime.fromisoformat(known["effectiveDateTime"]) - NOON).total_seconds() == 90.0
