"""Measures and alerts as FHIR resources, for who wants to show them beside other records.

Each is checked by the package ``fhir.resources`` (extra ``fhir``) before it is told. All are
``preliminary``: research and education software saw this, and nobody has looked at it. A subject
is an identifier, its pseudonym, never a reference to a patient's record.

A code stands only where it is known to mean the same: LOINC for heart rate, R-R interval standard
deviation, and the vital signs (https://hl7.org/fhir/R4/observation-vitalsigns.html); SNOMED CT's
UK edition for NEWS2 (https://nhsconnect.github.io/FHIR-NEWS2). What has none is told by its name.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib import import_module
from typing import Any, Literal, NamedTuple

from engine.errors import MurmurError
from engine.messages import NOTICE, Alert, Measures, Message

Release = Literal["R4B", "R5"]

# Not registered; they say what kind of name an identifier is.
_SUBJECTS, _STREAMS, _EPISODES = "urn:x-murmur:subject", "urn:x-murmur:stream", "urn:x-murmur:alert"
_LOINC, _SNOMED = "http://loinc.org", "http://snomed.info/sct"
_UCUM = "http://unitsofmeasure.org"
_CATEGORIES = "http://terminology.hl7.org/CodeSystem/observation-category"


class Code(NamedTuple):
    """How a measure is told."""

    text: str
    unit: str  # UCUM
    codes: tuple[tuple[str, str], ...] = ()  # system, code
    category: str = ""


_CODES = {
    "heart_rate_bpm": Code("Heart rate", "/min", ((_LOINC, "8867-4"),), "vital-signs"),
    "respiratory_rate_per_minute": Code(
        "Respiratory rate", "/min", ((_LOINC, "9279-1"),), "vital-signs"
    ),
    "spo2_percent": Code(
        "Oxygen saturation in arterial blood by pulse oximetry",
        "%",
        ((_LOINC, "2708-6"), (_LOINC, "59408-5")),
        "vital-signs",
    ),
    "systolic_mmhg": Code(
        "Systolic blood pressure", "mm[Hg]", ((_LOINC, "8480-6"),), "vital-signs"
    ),
    "temperature_celsius": Code("Body temperature", "Cel", ((_LOINC, "8310-5"),), "vital-signs"),
    "news2": Code("NEWS2 total score", "{score}", ((_SNOMED, "1104051000000101"),), "survey"),
    "sdnn_ms": Code("R-R interval standard deviation (SDNN)", "ms", ((_LOINC, "80404-7"),), "exam"),
    "rmssd_ms": Code("Root mean square of successive R-R differences (RMSSD)", "ms", (), "exam"),
    "pnn50": Code("Share of successive R-R differences above 50 ms (pNN50)", "1", (), "exam"),
}
_SEVERITIES = {"high": "high", "medium": "moderate", "low": "low"}
# Transitions that somebody would want to read about elsewhere.
_TOLD = frozenset({"active", "acknowledged", "latched", "resolved"})  # or what follows on them


class Export:
    """What turns messages into resources.

    Parameters
    ----------
    release : {"R4B", "R5"}
        R4B's observations and detected issues are those of R4.
    subject : str, optional
        Pseudonym of whom all observations are of; None: of a measure only the stream is known.
    every_s : float
        Of the stream: so often each measure is told.
    start : datetime, optional
        When sample 0 was; None: a message is taken to come as soon as its samples had.
    now : callable
        Returns the time, with its zone.

    Raises
    ------
    MurmurError
        If ``fhir.resources`` is not installed.
    """

    def __init__(
        self,
        release: Release,
        subject: str | None = None,
        every_s: float = 60.0,
        start: datetime | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        folder = "fhir.resources.R4B" if release == "R4B" else "fhir.resources"
        try:
            self._observation = import_module(f"{folder}.observation").Observation
            self._issue = import_module(f"{folder}.detectedissue").DetectedIssue
        except ImportError:
            raise MurmurError(
                "this needs the package fhir.resources: pip install 'murmur-engine[fhir]'"
            ) from None
        self._release, self._subject, self._every_s = release, subject, every_s
        self._start, self._now = start, now
        self._told: dict[tuple[str, str], float] = {}  # stream and measure: seconds

    def resources(self, message: Message) -> list[str]:
        """Return the JSON of each resource that a message makes; most make none."""
        match message:
            case Measures():
                return [
                    self._json(self._observation, self._observed(message, name, value))
                    for name, value in message.values.items()
                    if name in _CODES and self._due(message, name)
                ]
            case Alert() if message.state in _TOLD or message.from_state in _TOLD:
                return [self._json(self._issue, self._detected(message))]
            case _:
                return []

    def _due(self, message: Measures, name: str) -> bool:
        key = message.stream, name
        last = self._told.get(key)
        if last is not None and last <= message.seconds < last + self._every_s:
            return False
        self._told[key] = message.seconds
        return True

    def _json(self, kind: Any, fields: dict[str, Any]) -> str:
        text: str = kind.model_validate(fields).model_dump_json(exclude_none=True)
        return text

    def _observed(self, message: Measures, name: str, value: float) -> dict[str, Any]:
        code = _CODES[name]
        known = self._subject is not None
        who = (
            _identifier(_SUBJECTS, self._subject)
            if known
            else _identifier(_STREAMS, message.stream)
        )
        return {
            "status": "preliminary",
            "category": [{"coding": [{"system": _CATEGORIES, "code": code.category}]}],
            "code": _concept(code.text, code.codes),
            "subject": who,
            "effectiveDateTime": self._when(message),
            "issued": _stamp(self._now()),
            "valueQuantity": {
                "value": round(value, 3),
                "unit": code.unit,
                "system": _UCUM,
                "code": code.unit,
            },
            "device": _identifier(_STREAMS, message.stream),
            "note": [{"text": NOTICE}],
        }

    def _detected(self, message: Alert) -> dict[str, Any]:
        episode = f"{message.subject}/{message.rule}/{message.onset}"
        said = (
            f"{message.rule.replace('_', ' ')}: {message.state}; value {message.value:g}, "
            f"limit {message.limit:g}; {message.kind}, stream {message.stream}. {NOTICE}"
        )
        who = _identifier(_SUBJECTS, message.subject)
        return {
            "identifier": [{"system": _EPISODES, "value": episode}],
            "status": "preliminary",
            "code": _concept(message.rule, ()),
            "severity": _SEVERITIES[message.priority],
            "patient" if self._release == "R4B" else "subject": who,
            "identifiedDateTime": self._when(message),
            "detail": said,
        }

    def _when(self, message: Measures | Alert) -> str:
        if self._start is not None:
            return _stamp(self._start + timedelta(seconds=message.seconds))
        # Index over seconds is the rate, unless both are 0: then nothing is known of the delay.
        rate_hz = message.index / message.seconds if message.seconds else 0.0
        behind_s = (message.decided_at - message.index) / rate_hz if rate_hz else 0.0
        return _stamp(self._now() - timedelta(seconds=max(0.0, behind_s)))


def _identifier(system: str, value: str | None) -> dict[str, Any]:
    return {"identifier": {"system": system, "value": value}}


def _concept(text: str, codes: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    coding = [{"system": system, "code": code} for system, code in codes]
    return {"text": text, **({"coding": coding} if coding else {})}


def _stamp(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds")
