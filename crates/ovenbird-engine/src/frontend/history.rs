//! How history lines spell values: Go's `%q`, `%v` and durations, as BuildKit prints them.

use std::fmt::Write as _;

use ovenbird_oci::image::HealthConfig;

/// Go's `strconv.Quote`.
pub(super) fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        escape(&mut out, c, '"');
    }
    out.push('"');
    out
}

/// How `%q` writes a number: as the character with this code.
fn quoted_number(number: i64) -> String {
    let character = u32::try_from(number).ok().and_then(char::from_u32).unwrap_or(char::REPLACEMENT_CHARACTER);
    let mut out = String::from("'");
    escape(&mut out, character, '\'');
    out.push('\'');
    out
}

fn escape(out: &mut String, c: char, around: char) {
    match c {
        c if c == around => out.extend(['\\', c]),
        '\\' => out.push_str("\\\\"),
        '\u{7}' => out.push_str("\\a"),
        '\u{8}' => out.push_str("\\b"),
        '\u{c}' => out.push_str("\\f"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        '\u{b}' => out.push_str("\\v"),
        c if is_print(c) => out.push(c),
        c => {
            let n = u32::from(c);
            let _ = match n {
                0..0x80 => write!(out, "\\x{n:02x}"),
                0x80..0x1_0000 => write!(out, "\\u{n:04x}"),
                _ => write!(out, "\\U{n:08x}"),
            };
        }
    }
}

/// Near Go's `unicode.IsPrint`: no controls, no blanks but the space, no formatting, no private use.
fn is_print(c: char) -> bool {
    !(c.is_control()
        || (c.is_whitespace() && c != ' ')
        || matches!(u32::from(c), 0xad | 0x200b..=0x200f | 0x202a..=0x202e | 0x2060..=0x206f | 0xe000..=0xf8ff | 0xfeff | 0xfff0..=0xfffb | 0xffff)
        || u32::from(c) >= 0xe_0000 && !(0xe_0100..=0xe_01ef).contains(&u32::from(c)))
}

/// `["a" "b"]`.
pub(super) fn quoted_list(items: &[String]) -> String {
    let items: Vec<String> = items.iter().map(|item| quote(item)).collect();
    format!("[{}]", items.join(" "))
}

/// `[a b]`.
pub(super) fn plain_list(items: &[String]) -> String {
    format!("[{}]", items.join(" "))
}

/// `&{["CMD-SHELL" "x"] "30s" "0s" "0s" "0s" '\x00'}`: the last is the number of retries.
pub(super) fn health(health: &HealthConfig) -> String {
    let times = [health.interval, health.timeout, health.start_period, health.start_interval];
    let times: Vec<String> = times.iter().map(|time| quote(&duration(*time))).collect();
    format!("&{{{} {} {}}}", quoted_list(&health.test), times.join(" "), quoted_number(health.retries))
}

/// A Go duration: `1m30s`, `1.5s`, `250ms`.
pub(super) fn duration(nanoseconds: i64) -> String {
    let sign = if nanoseconds < 0 { "-" } else { "" };
    let n = nanoseconds.unsigned_abs();
    let fraction = |n: u64, unit: u64| {
        let digits = unit.ilog10() as usize;
        let rest = format!("{:0digits$}", n % unit);
        let rest = rest.trim_end_matches('0');
        if unit == 1 || rest.is_empty() { (n / unit).to_string() } else { format!("{}.{rest}", n / unit) }
    };
    match n {
        0 => "0s".into(),
        1..1_000 => format!("{sign}{n}ns"),
        1_000..1_000_000 => format!("{sign}{}µs", fraction(n, 1_000)),
        1_000_000..1_000_000_000 => format!("{sign}{}ms", fraction(n, 1_000_000)),
        _ => {
            const SECOND: u64 = 1_000_000_000;
            let seconds = fraction(n % (60 * SECOND), SECOND);
            let minutes = n / (60 * SECOND);
            match minutes {
                0 => format!("{sign}{seconds}s"),
                1..60 => format!("{sign}{minutes}m{seconds}s"),
                _ => format!("{sign}{}h{}m{seconds}s", minutes / 60, minutes % 60),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_spelling() {
        for (text, expect) in [
            ("a b", "\"a b\""),
            ("\"\\", r#""\"\\""#),
            ("a\n\t\u{1b}", r#""a\n\t\x1b""#),
            ("ä€😀", "\"ä€😀\""),
            ("\u{a0}\u{200b}", r#""\u00a0\u200b""#),
            ("\u{7f}", r#""\x7f""#),
        ] {
            assert_eq!(quote(text), expect);
        }
    }

    #[test]
    fn numbers_as_characters() {
        for (number, expect) in [
            (0, r"'\x00'"),
            (65, "'A'"),
            (39, r"'\''"),
            (34, "'\"'"),
            (173, r"'\u00ad'"),
            (300, "'Ĭ'"),
            (2_000_000, "'\u{fffd}'"),
            (-1, "'\u{fffd}'"),
        ] {
            assert_eq!(quoted_number(number), expect);
        }
    }

    #[test]
    fn durations() {
        for (nanoseconds, expect) in [
            (0, "0s"),
            (300_000_000_000, "5m0s"),
            (1_500_000_000, "1.5s"),
            (3_723_000_000_000, "1h2m3s"),
            (250_000_000, "250ms"),
            (1_500, "1.5µs"),
            (7, "7ns"),
            (-30_000_000_000, "-30s"),
            (60_000_000_001, "1m0.000000001s"),
        ] {
            assert_eq!(duration(nanoseconds), expect);
        }
    }
}
