//! Versions in tags and labels, and their order: that of Semantic Versioning 2.0.0, for two to four numbers and with an optional `v`.

use std::cmp::Ordering;
use std::fmt;

/// A version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    text: String,
    numbers: Vec<u64>,
    /// Parts of a pre-release; empty: a release.
    pre: Vec<String>,
}

/// Most numbers of a version.
const MAX_NUMBERS: usize = 4;

impl Version {
    /// Reads `v1.2`, `1.2.3`, `1.2.3-rc.1`, `1.2.3+build`. One number alone is none: it may be a date or a build number.
    pub fn parse(text: &str) -> Option<Self> {
        let (plain, _build) = text.split_once('+').unwrap_or((text, ""));
        let (core, pre) = plain.split_once('-').map_or((plain, None), |(core, pre)| (core, Some(pre)));
        let numbers = numbers(core)?;
        let pre: Vec<String> = pre.map(|pre| pre.split('.').map(str::to_owned).collect()).unwrap_or_default();
        let fits = (2..=MAX_NUMBERS).contains(&numbers.len()) && pre.iter().all(|part| !part.is_empty());
        fits.then(|| Self { text: text.to_owned(), numbers, pre })
    }

    /// Is it a release, no pre-release?
    pub fn is_release(&self) -> bool {
        self.pre.is_empty()
    }

    /// `v1` or `v1.2` of `v1.2.3`.
    pub fn line(&self, count: usize) -> String {
        let prefix: String = self.text.chars().take_while(|c| !c.is_ascii_digit()).collect();
        let numbers: Vec<String> = self.numbers.iter().take(count).map(u64::to_string).collect();
        prefix + &numbers.join(".")
    }

    /// Does a tag such as `v1.2` follow versions like this one? A tag that is no beginning of a version (`latest`) follows all.
    pub fn is_followed_by(&self, tag: &str) -> bool {
        numbers(tag).is_none_or(|line| self.numbers.starts_with(&line))
    }
}

/// `v1.2` as numbers.
fn numbers(text: &str) -> Option<Vec<u64>> {
    let digits = text.strip_prefix(['v', 'V']).unwrap_or(text);
    digits.split('.').map(|n| n.bytes().all(|b| b.is_ascii_digit()).then(|| n.parse().ok()).flatten()).collect()
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        let number = |version: &Self, at: usize| version.numbers.get(at).copied().unwrap_or(0);
        let core = (0..MAX_NUMBERS).map(|at| number(self, at).cmp(&number(other, at))).find(|order| order.is_ne());
        core.unwrap_or_else(|| match (self.pre.is_empty(), other.pre.is_empty()) {
            (true, false) => Ordering::Greater,
            (false, true) => Ordering::Less,
            _ => self.pre.iter().map(|part| Part::of(part)).cmp(other.pre.iter().map(|part| Part::of(part))),
        })
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Part of a pre-release: numbers are lower than words.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Part<'a> {
    Number(u64),
    Word(&'a str),
}

impl<'a> Part<'a> {
    fn of(text: &'a str) -> Self {
        let digits = text.bytes().all(|b| b.is_ascii_digit());
        text.parse().ok().filter(|_| digits).map_or(Self::Word(text), Self::Number)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order() {
        let rising = [
            "0.9",
            "1.0.0-alpha",
            "1.0.0-alpha.1",
            "1.0.0-alpha.beta",
            "1.0.0-beta",
            "1.0.0-beta.2",
            "1.0.0-beta.11",
            "1.0.0-rc.1",
            "v1.0",
            "1.2.3",
            "1.2.9",
            "v1.2.10",
            "1.10.0",
            "2.0.0.1",
        ];
        for pair in rising.windows(2) {
            let (low, high) = (Version::parse(pair[0]).unwrap(), Version::parse(pair[1]).unwrap());
            assert!(low < high, "{low} {high}");
        }
        assert_eq!(Version::parse("v1.0").unwrap().cmp(&Version::parse("1.0.0+b").unwrap()), Ordering::Equal);
        for none in [
            "",
            "v",
            "latest",
            "1",
            "20261121",
            "v2",
            "1.x",
            "1..2",
            "1.2.3.4.5",
            "1.2-",
            "1.2-a..b",
            "+1.2",
            "1.2.99999999999999999999",
            "a1.2",
        ] {
            assert_eq!(Version::parse(none), None, "{none}");
        }
    }

    #[test]
    fn lines() {
        let version = Version::parse("v1.2.3-rc.1").unwrap();
        assert_eq!((version.line(1), version.line(2), version.is_release()), ("v1".into(), "v1.2".into(), false));
        for (tag, follows) in
            [("v1", true), ("1.2", true), ("v1.3", false), ("2", false), ("latest", true), ("main", true), ("v1.2.3", true)]
        {
            assert_eq!(version.is_followed_by(tag), follows, "{tag}");
        }
    }
}
