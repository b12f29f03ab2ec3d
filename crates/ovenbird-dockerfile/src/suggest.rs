//! "Did you mean": the nearest known name within two edits.

/// Largest number of edits that still counts as a slip.
const MAX_EDITS: usize = 2;

/// The option nearest to `word` (case does not count), unless it is further than two edits, shares
/// no character with it, or one of the options is the word itself. The first of equally near options wins.
///
/// ```
/// assert_eq!(ovenbird_dockerfile::suggest::nearest("plaftorm", ["from", "platform"]), Some("platform"));
/// assert_eq!(ovenbird_dockerfile::suggest::nearest("badcmd", ["cmd"]), None);
/// ```
pub fn nearest<'o>(word: &str, options: impl IntoIterator<Item = &'o str>) -> Option<&'o str> {
    // As many edits as characters is another word, not a slip.
    search(word, options, str::to_lowercase, |edits, shorter| edits < shorter)
}

/// The variable nearest to `name`, as BuildKit's checks name it: case counts, and a name of one or two letters is near to any other.
///
/// ```
/// assert_eq!(ovenbird_dockerfile::suggest::nearest_variable("PAHT", ["HOME", "PATH"]), Some("PATH"));
/// assert_eq!(ovenbird_dockerfile::suggest::nearest_variable("hash", ["PATH"]), None);
/// ```
pub fn nearest_variable<'o>(name: &str, options: impl IntoIterator<Item = &'o str>) -> Option<&'o str> {
    search(name, options, str::to_owned, |_, _| true)
}

fn search<'o>(
    word: &str,
    options: impl IntoIterator<Item = &'o str>,
    fold: fn(&str) -> String,
    is_slip: fn(usize, usize) -> bool,
) -> Option<&'o str> {
    let word: Vec<char> = fold(word).chars().collect();
    let mut best = None;
    for option in options {
        let candidate: Vec<char> = fold(option).chars().collect();
        if word.len().abs_diff(candidate.len()) > MAX_EDITS {
            continue;
        }
        match edits(&word, &candidate) {
            0 => return None,
            n if n <= MAX_EDITS && is_slip(n, word.len().min(candidate.len())) && best.is_none_or(|(b, _)| n < b) => {
                best = Some((n, option));
            }
            _ => {}
        }
    }
    best.map(|(_, option)| option)
}

/// ` (did you mean x?)`, or nothing.
pub(crate) fn suffix(suggestion: Option<&str>) -> String {
    suggestion.map_or_else(String::new, |s| format!(" (did you mean {s}?)"))
}

/// Levenshtein distance.
fn edits(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::{nearest, nearest_variable};

    #[test]
    fn nearest_name_within_two_edits() {
        for (word, options, expect) in [
            ("RUNS", &["RUN", "CMD"][..], Some("RUN")),
            ("foo", &["chown", "from", "chmod"], Some("from")),
            ("BADCMD", &["ADD", "CMD"], None),
            ("run", &["RUN"], None),
            ("", &["ab"], None),
            ("id", &["rw", "ro"], None),
            ("rx", &["rw", "ro"], Some("rw")),
            ("cpoy", &["COPY"], Some("COPY")),
            ("안녕한", &["안녕"], Some("안녕")),
            ("anything", &[], None),
        ] {
            assert_eq!(nearest(word, options.iter().copied()), expect, "{word}");
        }
    }

    #[test]
    fn variables() {
        for (name, options, expect) in
            [("baz", &["bar", "PATH"][..], Some("bar")), ("d", &["a", "PATH"], Some("a")), ("hash", &["PATH"], None), ("a", &["a"], None)]
        {
            assert_eq!(nearest_variable(name, options.iter().copied()), expect, "{name}");
        }
    }
}
