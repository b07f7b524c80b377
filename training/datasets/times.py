"""Times as files write them, to Unix seconds: which form a column has is told by all of its values together.

Numbers from 1990 to 2099 are seconds, milliseconds, microseconds or nanoseconds since 1970, or digits of a calendar:
YYYYMMDD, YYYYMMDDHH, YYYYMMDDHHMM, YYYYMMDDHHMMSS or YYMMDDHH. No number is in range in two of these, but for two
pairs: eight digits may be YYYYMMDD or YYMMDDHH (only the one is taken that all rows agree on), and ten digits that are
a date and an hour in every row are that, as the seconds they could be are those of 2033 to 2036. Text is ISO 8601.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

FIRST_S, END_S = 631_152_000, 4_102_444_800  # of 1990 and of 2100
_US = 1_000_000


@dataclass(frozen=True, kw_only=True)
class NumberForm:
    """One way in which a number is a time: so many units a second, or digits of a calendar."""

    words: str
    low: int
    high: int
    units_a_second: int | None = None
    before: str = ""  # and after: what makes the digits YYYYMMDDHHMMSS
    after: str = ""

    def is_plausible(self, number: pl.Expr) -> pl.Expr:
        """Whether a number may be a time of this form, as far as its digits tell: 31 February may."""
        inside: pl.Expr = (number >= self.low) & (number <= self.high)
        if self.units_a_second is not None:
            return inside
        digits = number.fill_null(0).cast(pl.Int64, strict=False) * 10 ** len(self.after)  # MMDDHHMMSS are the last ten
        month, day, hour, minute, second = (digits // 100**place % 100 for place in (4, 3, 2, 1, 0))
        is_date = month.is_between(1, 12) & day.is_between(1, 31)
        plausible: pl.Expr = inside & (number == number.round()) & is_date & (hour < 24) & (minute < 60) & (second < 60)
        return plausible

    def microseconds(self, number: pl.Expr) -> pl.Expr:
        """Since 1970, of the wall clock for a calendar; null where the number is no time of this form."""
        inside = pl.when((number >= self.low) & (number <= self.high)).then(number)
        if self.units_a_second is not None:
            return (inside * (_US / self.units_a_second)).round().cast(pl.Int64)
        integer = pl.when(inside == inside.round()).then(inside).cast(pl.Int64)
        text = pl.lit(self.before) + integer.cast(pl.String).str.zfill(len(str(self.high))) + pl.lit(self.after)
        return text.str.to_datetime("%Y%m%d%H%M%S", strict=False, time_unit="us").dt.epoch("us")


NUMBER_FORMS: Mapping[str, NumberForm] = {
    **{
        words: NumberForm(words=f"Unix {words}", low=FIRST_S * units, high=END_S * units - 1, units_a_second=units)
        for words, units in (("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9))
    },
    **{
        words: NumberForm(
            words=words,
            low=int("1990010100000000"[:digits]),
            high=int("20991231235959"[:digits]),
            after="0" * (14 - digits),
        )
        for words, digits in (("YYYYMMDD", 8), ("YYYYMMDDHH", 10), ("YYYYMMDDHHMM", 12), ("YYYYMMDDHHMMSS", 14))
    },
    "YYMMDDHH": NumberForm(words="YYMMDDHH", low=10100, high=99123123, before="20", after="0000"),
}
EXPECTED = "Unix seconds from 1990 on or an ISO 8601 time"


def in_zone(microseconds: pl.Expr, timezone: str) -> pl.Expr:
    """Unix seconds of a wall clock's microseconds; null in the hour that summer time leaves out."""
    wall = pl.from_epoch(microseconds, time_unit="us")
    there = wall.dt.replace_time_zone(timezone, ambiguous="earliest", non_existent="null")
    return there.dt.epoch("us").cast(pl.Float64) / _US


def of_text(text: pl.Expr, timezone: str, form: str | None) -> pl.Expr:
    """Unix seconds of ISO 8601 or of a strptime form; null where it is neither. Without a zone it is in `timezone`."""
    if form is not None:
        parsed = text.str.strip_chars().str.to_datetime(form, strict=False, time_unit="us")
        if "%z" in form:
            return parsed.dt.epoch("us").cast(pl.Float64) / _US
        return in_zone(parsed.dt.epoch("us"), timezone)
    both = text.map_batches(_iso, return_dtype=pl.Struct({"us": pl.Int64, "has_zone": pl.Boolean}), is_elementwise=True)
    us, has_zone = both.struct.field("us"), both.struct.field("has_zone")
    return pl.when(has_zone).then(us.cast(pl.Float64) / _US).otherwise(in_zone(us, timezone))


def is_timezone(name: str) -> bool:
    try:
        pl.select(in_zone(pl.lit(0, dtype=pl.Int64), name))
    except pl.exceptions.ComputeError:
        return False
    return True


def spoken(seconds: float) -> str:
    """A time as a person reads it, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _iso(series: pl.Series) -> pl.Series:
    known = {text: _parsed(text) for text in series.drop_nulls().unique()}
    times = [known.get(text, (None, None)) for text in series] if known else [(None, None)] * len(series)
    return pl.DataFrame(
        {"us": [us for us, _ in times], "has_zone": [has_zone for _, has_zone in times]},
        schema={"us": pl.Int64, "has_zone": pl.Boolean},
    ).to_struct(series.name)


_1970 = datetime(1970, 1, 1, tzinfo=UTC)


def _parsed(text: str) -> tuple[int | None, bool | None]:
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        return None, None
    since = (time if time.tzinfo else time.replace(tzinfo=UTC)) - _1970
    return (since.days * 86_400 + since.seconds) * _US + since.microseconds, time.tzinfo is not None
