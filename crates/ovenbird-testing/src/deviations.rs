//! The list of deviations: the tables of `docs/reference/deviations.md`, which people and the oracle read alike.
//!
//! The first cell of a row names cases in backticks, and may end with the levels it holds for: `` `copy/x/y` (rootless) ``. Rows under
//! the heading "Not comparable" are cases that are compared with nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::command::Level;
use crate::{AtPath, Error, Result, repository};

/// What the list says of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listed {
    /// The two builders differ, on purpose.
    Deviation,
    /// There is nothing to compare.
    NotComparable,
}

const PLACE: &str = "docs/reference/deviations.md";

/// Every case that the repository's list names for a level.
pub fn read(level: Level) -> Result<BTreeMap<String, Listed>> {
    let path = repository().join(PLACE);
    parse(&fs::read_to_string(&path).at("cannot read", Path::new(PLACE))?, level)
}

fn parse(text: &str, level: Level) -> Result<BTreeMap<String, Listed>> {
    let mut all = BTreeMap::new();
    let mut listed = Listed::Deviation;
    for (index, line) in text.lines().enumerate() {
        let bad = |reason: String| Error::Malformed { place: format!("{PLACE}:{}", index + 1), reason };
        if let Some(heading) = line.strip_prefix("## ") {
            listed = if heading.trim() == "Not comparable" { Listed::NotComparable } else { Listed::Deviation };
        }
        let Some(row) = line.strip_prefix('|') else { continue };
        let cell = row.split('|').next().unwrap_or_default().trim();
        if cell == "case" || cell.starts_with("---") {
            continue;
        }
        // Names stand between backticks: every other piece.
        let pieces: Vec<&str> = cell.split('`').collect();
        let names: Vec<&str> = pieces.iter().skip(1).step_by(2).copied().collect();
        if names.is_empty() || pieces.len().is_multiple_of(2) {
            return Err(bad(format!("the row names no case: {cell:?}")));
        }
        let holds = match pieces.last().map(|end| end.trim()) {
            None | Some("") => true,
            Some(end) => {
                let words = end.strip_prefix('(').and_then(|end| end.strip_suffix(')'));
                let words = words.ok_or_else(|| bad(format!("{end:?} are no levels in parentheses")))?;
                let levels: Option<Vec<Level>> = words.split(',').map(|word| Level::parse(word.trim())).collect();
                levels.ok_or_else(|| bad(format!("{words:?} are no levels")))?.contains(&level)
            }
        };
        for name in names {
            if holds && all.insert(name.to_owned(), listed).is_some() {
                return Err(bad(format!("{name} is listed twice")));
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_name_cases() -> Result<()> {
        let text = "# T\n| case | b |\n|---|---|\n| `a/b/c`, `a/b/d` | x |\n| `e/f/g` (rootless, single-id) | x |\n\
                    ## Not comparable\n| case | why |\n|---|---|\n| `h/i/j` | y |\n";
        let names = |level| parse(text, level).map(|all| all.into_iter().collect::<Vec<_>>());
        let deviation = |name: &str| (name.to_owned(), Listed::Deviation);
        let other = ("h/i/j".to_owned(), Listed::NotComparable);
        assert_eq!(names(Level::Own)?, [deviation("a/b/c"), deviation("a/b/d"), other.clone()]);
        assert_eq!(names(Level::Rootless)?, [deviation("a/b/c"), deviation("a/b/d"), deviation("e/f/g"), other]);
        for (text, expected) in [
            ("| no name | x |", "names no case"),
            ("| `a | x |", "names no case"),
            ("| `a` (somewhere) | x |", "no levels"),
            ("| `a` rootless | x |", "no levels"),
            ("| `a` | x |\n| `a` | x |", "listed twice"),
        ] {
            let error = parse(text, Level::Own).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        Ok(())
    }
}
