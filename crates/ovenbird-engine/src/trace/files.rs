//! What a step read of a local context, file by file, and how two such lists differ.

use std::cmp::Ordering;
use std::path::Path;

use ovenbird_oci::Digest;

use crate::snapshot::content_hash::ContentHash;
use crate::state::{State, StateError};

/// Differences that are named; the rest is counted.
const MOST_NAMED: usize = 5;
/// Longer lists are not kept, in bytes.
const MOST_BYTES: usize = 64 << 20;

/// One file, folder or link as it counts for a cache key: what does not count is `None`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileState {
    /// `f`, `d`, `l`, `p`, `s`, `c` or `b`; `h` for a file that is another name of one before it.
    pub kind: u8,
    /// Permission bits.
    pub mode: Option<u32>,
    /// User and group.
    pub owner: Option<(u32, u32)>,
    /// Content of a file, target of a link, number of a device, first name of an `h`; of nothing for the rest.
    pub content: ContentHash,
    /// Extended attributes.
    pub xattrs: Option<ContentHash>,
}

/// First bytes, so that a change of the form changes every key.
const FORM: &[u8] = b"ovenbird content 4\n";
const MODE: u8 = 1;
const OWNER: u8 = 2;
const XATTRS: u8 = 4;

/// Everything that a copy or a mount sees of a context, in the order of the walk. Its digest is the content key; kept, it is what a
/// later build is compared with.
///
/// Bytes, for there may be many files: [`FORM`], then for each source its name, length first (`S`), for each entry its path below the
/// source, length first, kind, which of the rest it has, mode, owner, 32 bytes of BLAKE3 of its content and of its attributes (`E`), and
/// for a folder of which only the content counts nothing (`T`). Numbers are `u32`, little endian.
#[derive(Debug, PartialEq, Eq)]
pub struct Listing {
    bytes: Vec<u8>,
    /// Where the sources lie in the context, for people.
    sources: Vec<String>,
}

impl Default for Listing {
    fn default() -> Self {
        Self { bytes: FORM.to_vec(), sources: Vec::new() }
    }
}

impl Listing {
    /// A source: its name counts, for it may be what the copy is called; where it lies does not.
    pub fn source(&mut self, name: &[u8], path: &Path) {
        self.bytes.push(b'S');
        self.field(name);
        self.place(path);
    }

    /// Where the entries that follow lie.
    pub fn place(&mut self, path: &Path) {
        self.sources.push(path.to_string_lossy().into_owned());
    }

    /// A folder that does not count itself.
    pub fn top(&mut self) {
        self.bytes.push(b'T');
    }

    /// An entry; its path is relative to the source.
    pub fn entry(&mut self, path: &[u8], file: &FileState) {
        self.bytes.push(b'E');
        self.field(path);
        let mark = |is: bool, mark| if is { mark } else { 0 };
        let has = mark(file.mode.is_some(), MODE) | mark(file.owner.is_some(), OWNER) | mark(file.xattrs.is_some(), XATTRS);
        self.bytes.extend([file.kind, has]);
        let (mode, owner) = (file.mode.into_iter(), file.owner.into_iter().flat_map(|(uid, gid)| [uid, gid]));
        mode.chain(owner).for_each(|number| self.bytes.extend(number.to_le_bytes()));
        self.bytes.extend(file.content.as_bytes());
        file.xattrs.iter().for_each(|xattrs| self.bytes.extend(xattrs.as_bytes()));
    }

    fn field(&mut self, bytes: &[u8]) {
        self.bytes.extend((bytes.len() as u32).to_le_bytes());
        self.bytes.extend(bytes);
    }

    /// The content key.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }

    /// All entries, sorted by path. `None`: damaged.
    fn entries(&self) -> Option<Vec<Listed<'_>>> {
        let (mut entries, mut sources, mut source) = (Vec::new(), self.sources.iter(), "");
        let mut rest = Rest(self.bytes.strip_prefix(FORM)?);
        if !matches!(rest.0.first(), Some(b'S') | None) {
            source = sources.next()?;
        }
        while let Some([mark]) = rest.take::<1>() {
            match mark {
                b'S' => {
                    rest.field()?;
                    source = sources.next()?;
                }
                b'T' => {}
                _ => {
                    let below = rest.field()?;
                    let file = rest.0;
                    rest.file()?;
                    entries.push(Listed { source, below, file: &file[..file.len() - rest.0.len()] });
                }
            }
        }
        entries.sort_unstable();
        entries.dedup();
        Some(entries)
    }
}

/// An entry where it lies in the listing: there may be many, and few of them differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Listed<'l> {
    source: &'l str,
    below: &'l [u8],
    file: &'l [u8],
}

impl Listed<'_> {
    fn place(&self) -> (&str, &[u8]) {
        (self.source, self.below)
    }

    /// In the context; bytes that are not UTF-8 are replaced.
    fn path(&self) -> String {
        let (source, below) = (self.source, String::from_utf8_lossy(self.below));
        if below.is_empty() || source.is_empty() { format!("{source}{below}") } else { format!("{source}/{below}") }
    }

    fn state(&self) -> Option<FileState> {
        Rest(self.file).file()
    }
}

/// What is still to be read of a listing.
struct Rest<'b>(&'b [u8]);

impl<'b> Rest<'b> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    fn number(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn field(&mut self) -> Option<&'b [u8]> {
        let length = usize::try_from(self.number()?).ok()?;
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }

    fn file(&mut self) -> Option<FileState> {
        let [kind, has] = self.take()?;
        let mode = if has & MODE == 0 { None } else { Some(self.number()?) };
        let owner = if has & OWNER == 0 { None } else { Some((self.number()?, self.number()?)) };
        let content = ContentHash::from_bytes(self.take()?);
        let xattrs = if has & XATTRS == 0 { None } else { Some(ContentHash::from_bytes(self.take()?)) };
        Some(FileState { kind, mode, owner, content, xattrs })
    }
}

/// The listing of a content key. A damaged one counts as missing.
pub fn load(state: &State, content: &Digest) -> Option<Listing> {
    let kept = std::fs::read(state.traces_dir().join(name(content))).ok()?;
    let (sources, bytes) = kept.split_at_checked(kept.iter().position(|byte| *byte == 0)?)?;
    let listing = Listing { sources: serde_json::from_slice(sources).ok()?, bytes: bytes[1..].to_vec() };
    (listing.digest() == *content).then_some(listing)
}

/// Keeps a listing, unless it is there already or too long.
pub fn save(state: &State, content: &Digest, listing: &Listing) -> Result<(), StateError> {
    if listing.bytes.len() > MOST_BYTES || state.traces_dir().join(name(content)).exists() {
        return Ok(());
    }
    let mut kept = serde_json::to_vec(&listing.sources).unwrap_or_default();
    kept.push(0);
    kept.extend(&listing.bytes);
    state.write_trace(&name(content), &kept)
}

fn name(content: &Digest) -> String {
    format!("{}{}", PREFIX, content.hex())
}

/// Begins the names of lists among the traces.
pub(super) const PREFIX: &str = "files-";

/// How the files changed: `file src/a.py content changed`.
pub fn differences(before: &Listing, now: &Listing) -> Vec<String> {
    compare(before, now).unwrap_or_default()
}

fn compare(before: &Listing, now: &Listing) -> Option<Vec<String>> {
    let (before, now) = (before.entries()?, now.entries()?);
    let (mut old, mut new) = (before.iter().peekable(), now.iter().peekable());
    let (mut found, mut removed, mut more) = (vec![], vec![], 0);
    let mut say = |found: &mut Vec<String>, text: String| if found.len() < MOST_NAMED { found.push(text) } else { more += 1 };
    loop {
        let order = match (old.peek(), new.peek()) {
            (None, None) => break,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(old), Some(new)) => old.place().cmp(&new.place()),
        };
        let before = if order.is_le() { old.next() } else { None };
        let now = if order.is_ge() { new.next() } else { None };
        match (before, now) {
            (Some(before), Some(now)) if before.file == now.file => {}
            (Some(before), Some(now)) => {
                let (before, file) = (before.state()?, now.state()?);
                say(&mut found, format!("{} {} {}", noun(&file), now.path(), change(&before, &file)));
            }
            (None, Some(now)) => say(&mut found, format!("{} {} was added", noun(&now.state()?), now.path())),
            (Some(before), None) => say(&mut removed, format!("{} {} was removed", noun(&before.state()?), before.path())),
            (None, None) => {}
        }
    }
    found.append(&mut removed);
    more += found.len().saturating_sub(MOST_NAMED);
    found.truncate(MOST_NAMED);
    if more > 0 {
        found.push(format!("{more} more files changed"));
    }
    Some(found)
}

fn noun(file: &FileState) -> &'static str {
    match file.kind {
        b'd' => "folder",
        b'l' => "link",
        b'f' | b'h' => "file",
        _ => "special file",
    }
}

fn change(before: &FileState, now: &FileState) -> String {
    if before.kind != now.kind {
        match (before.kind, now.kind) {
            (b'f', b'h') => return "is a hard link now".into(),
            (b'h', b'f') => return "is no hard link any more".into(),
            _ => {}
        }
        return format!("was a {} before", noun(before));
    }
    if before.content != now.content {
        return if now.kind == b'h' {
            "is a hard link to another file now".into()
        } else if now.kind == b'l' {
            "target changed".into()
        } else {
            "content changed".into()
        };
    }
    match (before.mode, now.mode) {
        (Some(old), Some(new)) if old != new => return format!("mode {old:04o} → {new:04o}"),
        _ => {}
    }
    match (before.owner, now.owner) {
        (Some(old), Some(new)) if old != new => format!("owner {}:{} → {}:{}", old.0, old.1, new.0, new.1),
        _ => "extended attributes changed".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(kind: u8, mode: u32, content: &str) -> FileState {
        FileState { kind, mode: Some(mode), owner: Some((0, 0)), content: ContentHash::of(content.as_bytes()), xattrs: None }
    }

    fn listing(files: &[(&str, FileState)]) -> Listing {
        let mut listing = Listing::default();
        listing.source(b"src", Path::new("the/src"));
        listing.top();
        for (path, file) in files {
            listing.entry(path.as_bytes(), file);
        }
        listing
    }

    #[test]
    fn differences_are_named() {
        let base = file(b'f', 0o644, "x");
        let one = |file: &FileState| vec![("a.py", file.clone())];
        for (before, now, expect) in [
            (one(&base), one(&base), vec![]),
            (one(&base), one(&file(b'f', 0o644, "y")), vec!["file the/src/a.py content changed"]),
            (one(&base), one(&file(b'f', 0o755, "x")), vec!["file the/src/a.py mode 0644 → 0755"]),
            (vec![], one(&base), vec!["file the/src/a.py was added"]),
            (vec![("d", file(b'd', 0o755, ""))], vec![], vec!["folder the/src/d was removed"]),
            (vec![("l", file(b'l', 0, "a"))], vec![("l", file(b'l', 0, "b"))], vec!["link the/src/l target changed"]),
            (vec![("l", file(b'l', 0, "a"))], vec![("l", file(b'f', 0, "a"))], vec!["file the/src/l was a link before"]),
            (one(&base), one(&FileState { owner: Some((1, 2)), ..base.clone() }), vec!["file the/src/a.py owner 0:0 → 1:2"]),
            (
                one(&base),
                one(&FileState { xattrs: Some(ContentHash::of(b"")), ..base.clone() }),
                vec!["file the/src/a.py extended attributes changed"],
            ),
        ] {
            assert_eq!(differences(&listing(&before), &listing(&now)), expect);
        }
        let many: Vec<_> = ["0", "1", "2", "3", "4", "5", "6", "7", "8"].map(|name| (name, file(b'f', 0o644, ""))).to_vec();
        assert_eq!(differences(&listing(&[]), &listing(&many)).last().map(String::as_str), Some("4 more files changed"));
    }

    #[test]
    fn what_differs_has_another_digest() {
        let base = file(b'f', 0o644, "x");
        let variants = [
            vec![("a", base.clone())],
            vec![("b", base.clone())],
            vec![("a", base.clone()), ("b", base.clone())],
            vec![("a", FileState { mode: None, ..base.clone() })],
            vec![("a", FileState { owner: None, ..base.clone() })],
            vec![("a", FileState { owner: Some((0o644, 0)), mode: Some(0), ..base.clone() })],
            vec![("a", FileState { xattrs: Some(base.content), ..base.clone() })],
            vec![("a", FileState { kind: b'l', ..base })],
        ];
        let digests: std::collections::BTreeSet<Digest> = variants.iter().map(|files| listing(files).digest()).collect();
        assert_eq!(digests.len(), variants.len());
    }

    #[test]
    fn a_damaged_listing_is_read_to_no_bad_end() {
        let whole = listing(&[("a", file(b'f', 0o644, "x")), ("b", FileState { xattrs: Some(ContentHash::of(b"")), ..file(b'd', 0, "") })]);
        for end in 0..whole.bytes.len() {
            let part = Listing { bytes: whole.bytes[..end].to_vec(), sources: whole.sources.clone() };
            assert!(part.entries().is_none_or(|entries| entries.len() < 2), "{end}");
        }
        assert_eq!(whole.entries().map(|entries| entries.len()), Some(2));
    }
}
