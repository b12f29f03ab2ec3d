//! A source as the tar that a Docker Engine's build takes.
//!
//! The ignore file is applied here, so both of the engine's builders see the same files. It must not know how the tar is sent.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use ovenbird_engine::input::LocalContext;
use ovenbird_engine::snapshot::tree::{self, Kind, Tree, Visit};
use ovenbird_oci::Digest;
use ovenbird_oci::layer::tar::{self, Header, encode, padding};

use crate::request::DockerfileFrom;
use crate::source::SourceTree;

/// The one attribute that Docker's client sends.
const CAPABILITY: &str = "security.capability";
const IGNORE_FILE: &str = ".dockerignore";

/// The Dockerfile in the tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// It is a file of the context and stays one.
    InContext(String),
    /// It comes beside the context, under this name; no step may see it.
    Beside(String),
}

impl Place {
    /// Its path in the tar.
    pub(super) fn path(&self) -> &str {
        match self {
            Self::InContext(path) | Self::Beside(path) => path,
        }
    }

    /// Where the Dockerfile of a source goes.
    pub(super) fn of(source: &SourceTree, said: &DockerfileFrom) -> Self {
        let Some(context) = source.contexts.get("context") else { return Self::beside(source) };
        let found = candidates(said, &context.dir).into_iter().find(|path| holds(context, path, source.dockerfile.as_bytes()));
        found.and_then(|path| path.to_str().map(|path| Self::InContext(path.to_owned()))).unwrap_or_else(|| Self::beside(source))
    }

    fn beside(source: &SourceTree) -> Self {
        Self::Beside(format!(".ovenbird-{}.Dockerfile", &Digest::of(source.dockerfile.as_bytes()).hex()[..12]))
    }
}

/// Paths in the context that may be the Dockerfile.
fn candidates(said: &DockerfileFrom, dir: &Path) -> Vec<PathBuf> {
    match said {
        DockerfileFrom::Default => vec!["Dockerfile".into(), "dockerfile".into()],
        DockerfileFrom::Stdin => vec![],
        DockerfileFrom::Path(path) => {
            let seen_from_here = path.canonicalize().ok().and_then(|path| path.strip_prefix(dir).map(Path::to_owned).ok());
            // In an archive, the path is one of its own.
            seen_from_here.into_iter().chain(path.is_relative().then(|| tree::clean(path))).collect()
        }
    }
}

/// Is this a file that steps can see, with this text?
fn holds(context: &LocalContext, path: &Path, text: &[u8]) -> bool {
    if path.to_str().is_none_or(|path| context.ignore.is_ignored(path)) {
        return false;
    }
    let folder = context.tree();
    let Ok(Some(entry)) = folder.entry(path) else { return false };
    if entry.kind != Kind::File || entry.size != text.len() as u64 {
        return false;
    }
    let mut found = vec![];
    let read = folder.locate(path).and_then(|place| match place {
        Some(place) => place.open()?.take(entry.size + 1).read_to_end(&mut found),
        None => Err(io::ErrorKind::NotFound.into()),
    });
    read.is_ok() && found == text
}

/// Writes the tar, for the classic builder or for BuildKit.
pub(super) fn write(source: &SourceTree, place: &Place, buildkit: bool, out: &mut dyn Write) -> io::Result<()> {
    let mut tar = Tar { out, header: vec![], links: HashMap::new() };
    let mut ignore_file = None;
    if let Some(context) = source.contexts.get("context") {
        let folder = &*context.tree();
        for visit in tree::walk(folder, Path::new("")) {
            let visit = visit.map_err(|error| named(&error.path, error.source))?;
            // A folder that is left out but for something in it: Docker's client sends it to BuildKit only.
            if visit.partial && !buildkit {
                continue;
            }
            if matches!(place, Place::Beside(_)) && visit.path == Path::new(IGNORE_FILE) && visit.entry.kind == Kind::File {
                ignore_file = Some(read(folder, &visit).map_err(|source| named(&visit.path, source))?);
                continue;
            }
            tar.entry(folder, &visit).map_err(|source| named(&visit.path, source))?;
        }
    }
    if let Place::Beside(name) = place {
        // The classic builder takes away the Dockerfile and the ignore file when the ignore file names them.
        let ignore = match ignore_file {
            Some(text) => [&text[..], b"\n", name.as_bytes(), b"\n"].concat(),
            None => format!("{IGNORE_FILE}\n{name}\n").into_bytes(),
        };
        tar.file(IGNORE_FILE, &ignore)?;
        tar.file(name, source.dockerfile.as_bytes())?;
    }
    // Two empty blocks end it.
    tar.out.write_all(&[0; 2 * tar::BLOCK])
}

fn read(folder: &dyn Tree, visit: &Visit) -> io::Result<Vec<u8>> {
    let place = folder.locate(&visit.path)?.ok_or(io::ErrorKind::NotFound)?;
    let mut text = vec![];
    place.open()?.take(visit.entry.size).read_to_end(&mut text)?;
    Ok(text)
}

fn named(path: &Path, source: io::Error) -> io::Error {
    if source.kind() == io::ErrorKind::BrokenPipe {
        return source;
    }
    io::Error::new(source.kind(), format!("{}: {source}", path.display()))
}

struct Tar<'a> {
    out: &'a mut dyn Write,
    header: Vec<u8>,
    /// Where files with several names were written, by device and inode.
    links: HashMap<(u64, u64), Vec<u8>>,
}

impl Tar<'_> {
    fn header(&mut self, header: &Header) -> io::Result<()> {
        self.header.clear();
        encode(header, &mut self.header);
        with_type(header, &mut self.header);
        self.out.write_all(&self.header)
    }

    /// A file of ours.
    fn file(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        self.header(&Header { mode: 0o644, size: bytes.len() as u64, ..Header::new(path, tar::Kind::File) })?;
        self.out.write_all(bytes)?;
        self.out.write_all(&[0; tar::BLOCK][..padding(bytes.len() as u64)])
    }

    fn entry(&mut self, folder: &dyn Tree, visit: &Visit) -> io::Result<()> {
        let (path, entry) = (&visit.path, &visit.entry);
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        let (kind, device) = match entry.kind {
            Kind::File => (tar::Kind::File, (0, 0)),
            Kind::Dir => (tar::Kind::Directory, (0, 0)),
            Kind::Symlink => (tar::Kind::Symlink, (0, 0)),
            Kind::Char(major, minor) => (tar::Kind::Char, (major, minor)),
            Kind::Block(major, minor) => (tar::Kind::Block, (major, minor)),
            Kind::Fifo => (tar::Kind::Fifo, (0, 0)),
            // No tar has one.
            Kind::Socket => return Ok(()),
        };
        let mut name = path.as_os_str().as_bytes().to_vec();
        if kind == tar::Kind::Directory {
            name.push(b'/');
        }
        let place = folder.locate(path)?.ok_or(io::ErrorKind::NotFound)?;
        let mut header = Header {
            mode: entry.mode,
            uid: u64::from(entry.uid),
            gid: u64::from(entry.gid),
            mtime: entry.mtime.0,
            device,
            ..Header::new(name, kind)
        };
        match kind {
            tar::Kind::Symlink => header.link = place.read_link()?.into_os_string().into_vec(),
            tar::Kind::File if entry.inode.2 > 1 && self.links.contains_key(&(entry.inode.0, entry.inode.1)) => {
                header.kind = tar::Kind::Link;
                header.link = self.links[&(entry.inode.0, entry.inode.1)].clone();
            }
            tar::Kind::File => {
                if entry.inode.2 > 1 {
                    self.links.insert((entry.inode.0, entry.inode.1), header.path.clone());
                }
                header.size = entry.size;
                let attributes = place.xattrs()?.into_iter().filter(|(name, _)| name == OsStr::new(CAPABILITY));
                header.xattrs = attributes.map(|(name, value)| (name.into_vec(), value)).collect();
            }
            _ => {}
        }
        self.header(&header)?;
        if header.kind == tar::Kind::File {
            let copied = io::copy(&mut place.open()?.take(entry.size), self.out)?;
            if copied != entry.size {
                return Err(io::Error::other("it became shorter while it was read"));
            }
            self.out.write_all(&[0; tar::BLOCK][..padding(entry.size)])?;
        }
        Ok(())
    }
}

/// Puts the type into the mode of an encoded header. The classic builder's cache keys are made of headers as they come, and so Docker's client
/// writes them: a step that the one has built, the other finds.
fn with_type(header: &Header, encoded: &mut [u8]) {
    let Some(block) = encoded.last_chunk_mut::<{ tar::BLOCK }>() else { return };
    let mode = format!("{:07o}\0", (header.mode & 0o7777) | type_bits(header.kind));
    block[100..108].copy_from_slice(mode.as_bytes());
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// `S_IFMT` of an entry.
const fn type_bits(kind: tar::Kind) -> u32 {
    match kind {
        tar::Kind::File | tar::Kind::Link => 0o100_000,
        tar::Kind::Symlink => 0o120_000,
        tar::Kind::Char => 0o020_000,
        tar::Kind::Block => 0o060_000,
        tar::Kind::Directory => 0o040_000,
        tar::Kind::Fifo => 0o010_000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builder::Job;
    use crate::request::{BuildRequest, Source};
    use crate::source::Fetcher;

    /// What is in the tar for a context of these files: names, and the ignore file's text.
    fn check(files: &[(&str, &str)], said: &DockerfileFrom, text: &str, buildkit: bool) -> String {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join("c").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let mut request = BuildRequest::new(Source::Path(dir.path().join("c")));
        request.dockerfile = match said {
            DockerfileFrom::Path(path) => DockerfileFrom::Path(dir.path().join(path)),
            other => other.clone(),
        };
        let job = Job { sink: std::sync::Arc::new(ovenbird_engine::event::Silent), cancel: ovenbird_engine::Cancel::default() };
        let mut source = Fetcher::from(dir.path()).fetch(&request, &mut text.as_bytes(), &job).unwrap();
        if text.starts_with("changed") {
            source.dockerfile = text.into();
        }
        let place = Place::of(&source, &request.dockerfile);
        let mut bytes = vec![];
        write(&source, &place, buildkit, &mut bytes).unwrap();
        let mut found = vec![];
        for entry in ::tar::Archive::new(&bytes[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            assert_eq!((entry.header().uid().unwrap(), entry.header().gid().unwrap()), (0, 0));
            let is_dir = entry.header().entry_type().is_dir();
            assert_eq!(entry.header().mode().unwrap() >> 12, if is_dir { 4 } else { 8 });
            found.push(if name == IGNORE_FILE { format!("{name}={text:?}") } else { name });
        }
        let hidden = match &place {
            Place::Beside(name) => name.clone(),
            Place::InContext(_) => "none".into(),
        };
        format!("{} | {}", place.path(), found.join(" ")).replace(&hidden, "BESIDE")
    }

    #[test]
    fn what_is_sent() {
        let beside = |name: &str| DockerfileFrom::Path(name.into());
        for (files, said, text, expect) in [
            (&[("Dockerfile", "X"), ("a/b", "1")][..], DockerfileFrom::Default, "", "Dockerfile | Dockerfile a/ a/b"),
            (&[("dockerfile", "X")], DockerfileFrom::Default, "", "dockerfile | dockerfile"),
            (&[("Dockerfile", "X"), ("sub/D", "Y")], beside("c/sub/D"), "", "sub/D | Dockerfile sub/ sub/D"),
            (
                &[("Dockerfile", "X"), (".dockerignore", "Dockerfile\n*.o"), ("a.o", ""), ("a", "")],
                DockerfileFrom::Default,
                "",
                "BESIDE | a .dockerignore=\"Dockerfile\\n*.o\\nBESIDE\\n\" BESIDE",
            ),
            (
                &[("Dockerfile", "X"), (".dockerignore", "Dockerfile\n.dockerignore"), ("a", "")],
                DockerfileFrom::Default,
                "",
                "BESIDE | a .dockerignore=\".dockerignore\\nBESIDE\\n\" BESIDE",
            ),
            (&[("a", "")], DockerfileFrom::Stdin, "FROM x", "BESIDE | a .dockerignore=\".dockerignore\\nBESIDE\\n\" BESIDE"),
            // A plugin may change the Dockerfile: what is built is what was decided, not what lies there.
            (
                &[("Dockerfile", "X")],
                DockerfileFrom::Default,
                "changed",
                "BESIDE | Dockerfile .dockerignore=\".dockerignore\\nBESIDE\\n\" BESIDE",
            ),
            (
                &[("D", "X"), ("D.dockerignore", "a\nD"), (".dockerignore", "b"), ("a", ""), ("b", "")],
                beside("c/D"),
                "",
                "BESIDE | D.dockerignore b .dockerignore=\"b\\nBESIDE\\n\" BESIDE",
            ),
        ] {
            assert_eq!(check(files, &said, text, true), expect, "{files:?} {said:?}");
        }
        let files = [("Dockerfile", "X"), (".dockerignore", "d\n!d/a"), ("d/a", ""), ("d/b", "")];
        for (buildkit, sent) in [(true, "d/ d/a"), (false, "d/a")] {
            let ignore = ".dockerignore=\"d\\n!d/a\"";
            assert_eq!(check(&files, &DockerfileFrom::Default, "", buildkit), format!("Dockerfile | {ignore} Dockerfile {sent}"));
        }
    }
}
