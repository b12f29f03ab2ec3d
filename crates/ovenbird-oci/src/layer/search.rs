//! Looks for given bytes in everything that goes into a layer, while it goes.
//!
//! It must not know what the bytes are: a finding names the needle and the path, never the content.

use std::fmt;

use memchr::memmem::Finder;

use super::tar::Header;
use crate::growth::Growth;

/// What is looked for.
#[derive(Default)]
pub struct Needles {
    finders: Vec<Finder<'static>>,
    pub(super) longest: usize,
}

impl fmt::Debug for Needles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Needles({})", self.finders.len())
    }
}

impl Needles {
    /// A finding gives the place of the needle in this list. Empty ones are in nothing.
    pub fn new<'a>(needles: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let finders: Vec<_> = needles.into_iter().map(|needle| Finder::new(needle).into_owned()).collect();
        let longest = finders.iter().map(|finder| finder.needle().len()).max().unwrap_or(0);
        Self { finders, longest }
    }

    /// Is there nothing to look for?
    pub fn is_empty(&self) -> bool {
        self.longest == 0
    }

    /// The first needle in a text that is there as a whole.
    pub fn find(&self, text: &[u8]) -> Option<usize> {
        self.finders.iter().position(|finder| is_in(finder, text))
    }
}

fn is_in(finder: &Finder, text: &[u8]) -> bool {
    !finder.needle().is_empty() && text.len() >= finder.needle().len() && finder.find(text).is_some()
}

/// A needle and the first path where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Place in the list of needles.
    pub needle: usize,
    /// Path in the layer.
    pub path: Vec<u8>,
}

/// Sees a layer go by. Memory: twice the longest needle.
pub(super) struct Watch<'a> {
    needles: &'a Needles,
    /// A blob of these bytes that is read meanwhile.
    growth: Option<&'a Growth>,
    found: Vec<Found>,
    /// The end of what was seen of this file: a needle may lie across two pieces.
    carry: Vec<u8>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(needles: &'a Needles, growth: Option<&'a Growth>) -> Self {
        Self { needles, growth, found: vec![], carry: vec![] }
    }

    pub(super) fn found(mut self) -> Vec<Found> {
        self.found.sort_by_key(|found| found.needle);
        self.found
    }

    /// A new entry: its names and attributes. Its content follows.
    pub(super) fn entry(&mut self, header: &Header) {
        if self.needles.is_empty() {
            return;
        }
        self.carry.clear();
        self.look(&header.path, &header.path);
        self.look(&header.path, &header.link);
        for (name, value) in &header.xattrs {
            self.look(&header.path, name);
            self.look(&header.path, value);
        }
    }

    /// The next piece of the content of `path`.
    pub(super) fn content(&mut self, path: &[u8], piece: &[u8]) {
        if self.needles.is_empty() {
            return;
        }
        let keep = self.needles.longest - 1;
        if !self.carry.is_empty() {
            let mut carry = std::mem::take(&mut self.carry);
            carry.extend_from_slice(&piece[..piece.len().min(keep)]);
            self.look(path, &carry);
            self.carry = carry;
        }
        self.look(path, piece);
        if piece.len() >= keep {
            self.carry.clear();
            self.carry.extend_from_slice(&piece[piece.len() - keep..]);
        } else {
            // The whole piece was added above, or is the first.
            if self.carry.is_empty() {
                self.carry.extend_from_slice(piece);
            }
            let surplus = self.carry.len().saturating_sub(keep);
            self.carry.drain(..surplus);
        }
    }

    fn look(&mut self, path: &[u8], text: &[u8]) {
        for (needle, finder) in self.needles.finders.iter().enumerate() {
            if !self.found.iter().any(|found| found.needle == needle) && is_in(finder, text) {
                self.growth.inspect(|growth| growth.stop());
                self.found.push(Found { needle, path: path.to_vec() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_size_hide_nothing() {
        let needles = Needles::new([&b"hunter2!"[..], b"absent-needle-of-length", b""]);
        let text = b"xxhunthunter2!yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy";
        for size in 1..text.len() {
            let mut watch = Watch::new(&needles, None);
            for piece in text.chunks(size) {
                watch.content(b"a/b", piece);
            }
            assert_eq!(watch.found(), [Found { needle: 0, path: b"a/b".to_vec() }], "{size}");
        }
    }

    #[test]
    fn a_needle_does_not_lie_across_files() {
        let needles = Needles::new([&b"hunter2!"[..]]);
        let mut watch = Watch::new(&needles, None);
        let header = |path: &[u8]| Header::new(path.to_vec(), crate::layer::tar::Kind::File);
        watch.entry(&header(b"a"));
        watch.content(b"a", b"hunt");
        watch.entry(&header(b"b"));
        watch.content(b"b", b"er2!");
        assert_eq!(watch.found(), []);
        let mut watch = Watch::new(&needles, None);
        watch.entry(&header(b"dir/hunter2!.txt"));
        assert_eq!(watch.found().len(), 1);
        assert!(Needles::new([]).is_empty() && Needles::default().find(b"x").is_none());
    }
}
