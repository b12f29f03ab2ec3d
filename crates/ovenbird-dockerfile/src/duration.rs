//! Go durations (`1h5m`, `1.5s`, `300ms`), as `HEALTHCHECK` and the image configuration use them.

/// A text that is not a Go duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid duration {text:?}: {reason}")]
pub struct DurationError {
    /// As written.
    pub text: String,
    /// Why, and what is expected.
    pub reason: &'static str,
}

/// Parses a Go duration into nanoseconds (Go's `time.ParseDuration`): an optional sign, then
/// numbers with a unit of `ns`, `us` (`µs`), `ms`, `s`, `m` or `h`; a bare `0` needs no unit.
pub fn parse_nanos(text: &str) -> Result<i64, DurationError> {
    let error = |reason| DurationError { text: text.to_owned(), reason };
    let missing_unit = || error("a unit is missing, write for example 30s, 1m30s or 500ms");
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(error("a number is missing, write for example 30s"));
    }
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(number_end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        rest = tail;
        let nanos: i128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            "" => return Err(missing_unit()),
            _ => return Err(error("unknown unit, the units are ns, us, ms, s, m and h")),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return Err(error("a number is missing, write for example 30s"));
        }
        let mut value = if whole.is_empty() { 0 } else { whole.parse::<i64>().map_err(|_| error("the number is too large"))?.into() };
        value *= nanos;
        // Digits beyond the eighteenth are below a nanosecond for every unit.
        let mut scale = 1;
        let mut part: i128 = 0;
        for digit in fraction.bytes().take(18) {
            part = part * 10 + i128::from(digit - b'0');
            scale *= 10;
        }
        value += part * nanos / scale;
        total += value;
        if total > i128::from(i64::MAX) {
            return Err(error("longer than 292 years"));
        }
    }
    let total = i64::try_from(total).map_err(|_| error("longer than 292 years"))?;
    Ok(if negative { -total } else { total })
}

#[cfg(test)]
mod tests {
    use super::parse_nanos;

    #[test]
    fn go_durations() {
        for (text, expect) in [
            ("0", Some(0)),
            ("+0", Some(0)),
            ("30s", Some(30_000_000_000)),
            ("1m30s", Some(90_000_000_000)),
            ("1h", Some(3_600_000_000_000)),
            ("1.5s", Some(1_500_000_000)),
            (".5s", Some(500_000_000)),
            ("5.s", Some(5_000_000_000)),
            ("-2ms", Some(-2_000_000)),
            ("3us", Some(3_000)),
            ("3µs", Some(3_000)),
            ("7ns", Some(7)),
            ("1h2m3s4ms5us6ns", Some(3_723_004_005_006)),
            ("0.3333333333333333333h", Some(1_199_999_999_999)),
            ("", None),
            ("s", None),
            (".s", None),
            ("5", None),
            ("1.2.3s", None),
            ("5x", None),
            ("5 s", None),
            ("99999999999999999999s", None),
            ("3000000h", None),
            ("--1s", None),
        ] {
            assert_eq!(parse_nanos(text).ok(), expect, "{text}");
        }
    }
}
