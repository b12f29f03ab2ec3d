//! From a request to its contexts and its Dockerfile.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_engine::input::LocalContext;
use ovenbird_oci::beside;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::archive::{self, Unpacked, read_text};
use super::bundle::Bundle;
use super::{Fetcher, Revision, SourceError, SourceTree, remote};
use crate::builder::Job;
use crate::error::Error;
use crate::request::{BuildRequest, ContextSource, DockerfileFrom, Source};

/// The main context, where files of it are looked up.
enum Root {
    /// A folder of the caller: links may lead anywhere the caller can read.
    Trusted(PathBuf),
    /// What was unpacked or fetched: nothing in it may name a file outside.
    Foreign {
        /// What is removed in the end.
        folder: beside::Folder,
        /// The context, in it.
        dir: PathBuf,
    },
}

impl Root {
    fn dir(&self) -> &Path {
        match self {
            Self::Trusted(dir) | Self::Foreign { dir, .. } => dir,
        }
    }

    fn open(&self, relative: &Path) -> io::Result<File> {
        match self {
            Self::Trusted(dir) => File::open(dir.join(relative)),
            Self::Foreign { dir, .. } => {
                let root = File::open(dir)?;
                let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let file = rustix::fs::openat2(root, relative, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)?;
                Ok(file.into())
            }
        }
    }
}

pub(super) fn fetch(fetcher: &Fetcher, request: &BuildRequest, stdin: &mut dyn Read, job: &Job) -> Result<SourceTree, Error> {
    let (mut inline, mut revision, mut origin, mut bundle) = (None, None, None, None);
    let (mut times, mut logins) = (BTreeMap::new(), BTreeMap::new());
    let root = match &request.source {
        Source::Path(path) => Root::Trusted(folder("build context", path)?),
        Source::Stdin if request.dockerfile == DockerfileFrom::Stdin => return Err(SourceError::StdinTwice.into()),
        Source::Stdin => {
            origin = Some("-".to_owned());
            let folder = fetcher.folder()?;
            let dir = folder.path().join("context");
            match archive::unpack(stdin, "the context on standard input", &dir)? {
                Unpacked::Context => {}
                Unpacked::Dockerfile(text) => inline = Some(text),
                Unpacked::Empty => return Err(SourceError::StdinEmpty { expected: "a tar archive or a Dockerfile" }.into()),
            }
            Root::Foreign { folder, dir }
        }
        // Docker, too, takes a folder of such a name for what it is.
        Source::Remote(url) if url.expose().starts_with("github.com/") && Path::new(url.expose()).is_dir() => {
            Root::Trusted(folder("build context", Path::new(url.expose()))?)
        }
        Source::Remote(url) => {
            logins.extend(url.login());
            let got = remote::fetch(fetcher, url, true, request, job)?;
            (inline, revision, bundle) = (got.dockerfile, got.revision, got.bundle);
            origin = Some(revision.as_ref().map_or_else(
                || url.to_string(),
                |Revision { url, subdir, .. }| format!("{url}#:{}", subdir.as_deref().unwrap_or_default()),
            ));
            times.extend(got.time.map(|time| ("context".to_owned(), time)));
            Root::Foreign { folder: got.folder, dir: got.dir }
        }
    };
    if inline.is_some() && request.dockerfile == DockerfileFrom::Stdin {
        return Err(SourceError::TwoDockerfiles.into());
    }
    if bundle.is_some() && request.dockerfile != DockerfileFrom::Default {
        return Err(SourceError::TwoDockerfiles.into());
    }
    let whole = bundle.is_some();
    let (dockerfile, bundled) = bundle.map(|Bundle { dockerfile, contexts }| (dockerfile, contexts)).unzip();
    let (name, text, beside) = match (&request.dockerfile, inline) {
        _ if dockerfile.is_some() => {
            let (name, text) = dockerfile.unwrap_or_default();
            (name, text, None)
        }
        (_, Some(text)) => ("Dockerfile".to_owned(), text, None),
        (DockerfileFrom::Stdin, None) => {
            let text = read_text("the Dockerfile on standard input", stdin)?;
            if text.trim().is_empty() {
                return Err(SourceError::StdinEmpty { expected: "a Dockerfile" }.into());
            }
            ("Dockerfile".to_owned(), text, None)
        }
        (DockerfileFrom::Path(path), None) => named(&root, path)?,
        (DockerfileFrom::Default, None) => default(&root)?,
    };
    let mut contexts = BTreeMap::new();
    let ignore = match beside {
        Some(patterns) => patterns,
        None if whole => Patterns::default(),
        None => ignore_file(&root, Path::new(".dockerignore"))?.unwrap_or_default(),
    };
    contexts.insert("context".to_owned(), LocalContext::new(root.dir(), ignore));
    for (name, (dir, ignore)) in bundled.into_iter().flatten() {
        contexts.insert(name, LocalContext::new(dir, ignore));
    }
    let mut kept = vec![];
    for (name, context) in &request.contexts {
        if whole && contexts.contains_key(name) {
            continue;
        }
        let of_this = |error: Error| error.while_doing(format!("build context {name:?}"));
        let root = match context {
            ContextSource::Path(path) => Root::Trusted(folder(&format!("build context {name:?}"), path)?),
            ContextSource::Remote(url) => {
                logins.extend(url.login());
                let got = remote::fetch(fetcher, url, false, request, job).map_err(of_this)?;
                times.extend(got.time.map(|time| (name.clone(), time)));
                Root::Foreign { folder: got.folder, dir: got.dir }
            }
            ContextSource::Image(_) | ContextSource::Target(_) => continue,
        };
        let ignore = ignore_file(&root, Path::new(".dockerignore"))?.unwrap_or_default();
        contexts.insert(name.clone(), LocalContext::new(root.dir(), ignore));
        kept.push(root);
    }
    kept.push(root);
    let unpacked = kept.into_iter().filter_map(|root| if let Root::Foreign { folder, .. } = root { Some(folder) } else { None });
    Ok(SourceTree {
        dockerfile: text,
        dockerfile_name: name,
        contexts,
        origin,
        revision,
        is_sent: false,
        git: None,
        logins,
        times,
        _unpacked: unpacked.collect(),
    })
}

/// The folder itself, links resolved, so that a later change of the working directory does not matter.
fn folder(what: &str, path: &Path) -> Result<PathBuf, SourceError> {
    let what = what.to_owned();
    match path.canonicalize() {
        Ok(dir) if dir.is_dir() => Ok(dir),
        Ok(_) => Err(SourceError::NotAFolder { what, path: path.into() }),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Err(SourceError::Missing { what, path: path.into() }),
        Err(source) => Err(SourceError::Read { what: format!("the {what} {}", path.display()), source }),
    }
}

type Found = (String, String, Option<Patterns>);

/// `-f PATH`: seen from the working directory; inside the archive when the context is one.
fn named(root: &Root, path: &Path) -> Result<Found, SourceError> {
    let here = match root {
        Root::Trusted(_) => Root::Trusted(PathBuf::new()),
        Root::Foreign { .. } => {
            let file = root.open(path).map_err(|source| not_found(root, path.into(), source))?;
            return finish(root, path, file);
        }
    };
    let file = here.open(path).map_err(|source| match source.kind() {
        // Docker users often write the path as seen from the context.
        io::ErrorKind::NotFound if root.dir().join(path).is_file() => {
            SourceError::NoDockerfile { path: path.into(), candidates: vec![shown(root).join(path)] }
        }
        _ => not_found(root, path.into(), source),
    })?;
    finish(&here, path, file)
}

fn default(root: &Root) -> Result<Found, SourceError> {
    for name in ["Dockerfile", "dockerfile"] {
        match root.open(Path::new(name)) {
            Ok(file) => return finish(root, Path::new(name), file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(SourceError::Read { what: root.dir().join(name).display().to_string(), source }),
        }
    }
    Err(not_found(root, shown(root).join("Dockerfile"), io::ErrorKind::NotFound.into()))
}

fn finish(root: &Root, path: &Path, mut file: File) -> Result<Found, SourceError> {
    let name = path.display().to_string();
    if file.metadata().is_ok_and(|m| m.is_dir()) {
        return Err(SourceError::Read { what: name, source: io::Error::from(io::ErrorKind::IsADirectory) });
    }
    let text = read_text(&name, &mut file)?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(".dockerignore");
    Ok((name, text, ignore_file(root, Path::new(&beside))?))
}

fn not_found(root: &Root, path: PathBuf, source: io::Error) -> SourceError {
    if source.kind() != io::ErrorKind::NotFound {
        return SourceError::Read { what: path.display().to_string(), source };
    }
    if let Root::Foreign { dir, .. } = root
        && let Some(error) = link_out(dir, &path)
    {
        return error;
    }
    let mut candidates: Vec<PathBuf> = std::fs::read_dir(root.dir())
        .into_iter()
        .flatten()
        .flatten()
        .take(1000)
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().to_ascii_lowercase();
            let named = name.starts_with("dockerfile") || name.starts_with("containerfile") || name.ends_with(".dockerfile");
            named && !name.ends_with(".dockerignore") && entry.path().is_file()
        })
        .map(|entry| shown(root).join(entry.file_name()))
        .collect();
    candidates.sort();
    candidates.truncate(3);
    SourceError::NoDockerfile { path, candidates }
}

/// The first link on the way to a file that leads nowhere inside the context.
fn link_out(dir: &Path, path: &Path) -> Option<SourceError> {
    let root = dir.canonicalize().ok()?;
    let mut seen = PathBuf::new();
    for part in path.components() {
        seen.push(part);
        // Up to here no link leads out, so nothing outside is looked at.
        let Ok(target) = std::fs::read_link(dir.join(&seen)) else { continue };
        if !dir.join(&seen).canonicalize().is_ok_and(|real| real.starts_with(&root)) {
            return Some(SourceError::LinkOut { path: seen, target });
        }
    }
    None
}

/// The context as a path for people: relative to the working directory when it is below it.
fn shown(root: &Root) -> PathBuf {
    match root {
        Root::Trusted(dir) => match Path::new(".").canonicalize() {
            Ok(here) => dir.strip_prefix(&here).map_or_else(|_| dir.clone(), Path::to_owned),
            Err(_) => dir.clone(),
        },
        Root::Foreign { .. } => PathBuf::new(),
    }
}

fn ignore_file(root: &Root, path: &Path) -> Result<Option<Patterns>, SourceError> {
    let mut file = match root.open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        Err(source) => return Err(SourceError::Read { what: path.display().to_string(), source }),
    };
    let text = read_text(&path.display().to_string(), &mut file)?;
    Patterns::parse(&text).map(Some).map_err(|source| SourceError::Ignore { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fetched(request: &BuildRequest, temp: &Path, mut stdin: &[u8]) -> Result<SourceTree, Error> {
        let job = Job { sink: std::sync::Arc::new(ovenbird_engine::event::Silent), cancel: ovenbird_engine::Cancel::default() };
        Fetcher::from(temp).fetch(request, &mut stdin, &job)
    }

    struct Fixture {
        dir: tempfile::TempDir,
    }

    impl Fixture {
        fn new(files: &[(&str, &str)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            for (name, text) in files {
                let path = dir.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            Self { dir }
        }

        fn fetch(&self, source: &str, dockerfile: Option<&str>, stdin: &[u8]) -> Result<SourceTree, Error> {
            let source = if source == "-" { Source::Stdin } else { Source::Path(self.dir.path().join(source)) };
            let mut request = BuildRequest::new(source);
            request.dockerfile = match dockerfile {
                None => DockerfileFrom::Default,
                Some("-") => DockerfileFrom::Stdin,
                Some(path) if request.source == Source::Stdin => DockerfileFrom::Path(path.into()),
                Some(path) => DockerfileFrom::Path(self.dir.path().join(path)),
            };
            fetched(&request, self.dir.path(), stdin)
        }

        fn told(&self, source: &str, dockerfile: Option<&str>, stdin: &[u8]) -> String {
            let root = self.dir.path().display().to_string();
            match self.fetch(source, dockerfile, stdin) {
                Ok(tree) => format!("{}|{}", tree.dockerfile_name.replace(&root, "R"), tree.dockerfile),
                Err(error) => format!("! {error} / {}", error.hints.join(" / ")).replace(&root, "R"),
            }
        }
    }

    #[test]
    fn what_was_unpacked_goes_with_its_owner() {
        let f = Fixture::new(&[]);
        let left = || std::fs::read_dir(f.dir.path()).unwrap().count();
        std::fs::create_dir(f.dir.path().join(".ovenbird-partial-0123456789ab")).unwrap();
        let first = f.fetch("-", None, b"FROM scratch").unwrap();
        assert_eq!(left(), 1, "of a killed build nothing is left");
        let second = f.fetch("-", None, b"FROM scratch").unwrap();
        assert_eq!(left(), 2);
        drop((first, second));
        assert_eq!(left(), 0);
    }

    #[test]
    fn where_the_dockerfile_is() {
        let f = Fixture::new(&[
            ("a/Dockerfile", "FROM a"),
            ("b/dockerfile", "FROM b"),
            ("c/Containerfile", "FROM c"),
            ("x/D", "FROM x"),
            ("d/e", ""),
            ("a/sub/D", "FROM s"),
        ]);
        std::fs::write(f.dir.path().join("x/latin"), b"FROM x\n# \xe9").unwrap();
        for (source, dockerfile, stdin, expect) in [
            ("a", None, "", "Dockerfile|FROM a"),
            ("b", None, "", "dockerfile|FROM b"),
            ("c", None, "", "! there is no Dockerfile at R/c/Dockerfile / did you mean `-f R/c/Containerfile`?"),
            ("d", None, "", "! there is no Dockerfile at R/d/Dockerfile / give its place with `-f FILE`"),
            ("a", Some("x/D"), "", "R/x/D|FROM x"),
            ("a", Some("-"), "FROM i", "Dockerfile|FROM i"),
            ("a", Some("-"), " \n", "! standard input is empty: expected a Dockerfile"),
            ("a", Some("x/none"), "", "! there is no Dockerfile at R/x/none / did you mean `-f R/a/Dockerfile`?"),
            ("a", Some("x"), "", "! cannot read R/x: "),
            ("a", Some("x/latin"), "", "! R/x/latin is not UTF-8 text (line 2)"),
            ("none", None, "", "! the build context R/none does not exist"),
            ("d/e", None, "", "! the build context R/d/e is not a folder / for a Dockerfile use `-f R/d/e`"),
            ("-", None, "FROM scratch\n", "Dockerfile|FROM scratch"),
            ("-", None, "", "! standard input is empty: expected a tar archive or a Dockerfile"),
            ("-", Some("-"), "x", "! both the context and the Dockerfile are to be read from standard input"),
            ("-", None, "BZh91AY&SY", "! the context on standard input cannot be unpacked: "),
        ] {
            let got = f.told(source, dockerfile, stdin.as_bytes());
            assert!(got.starts_with(expect), "{source} {dockerfile:?}: {got}");
        }
    }

    #[test]
    fn compressed_archives_on_standard_input() {
        let f = Fixture::new(&[]);
        // A tar with a Dockerfile, by bzip2 and xz.
        for hex in [
            "425a6839314159265359ed23e88400002adf80ca9040006f80050291006b6c9e000c08200054664d34f44340686806da504a44d1a0d034340d0041a7c83582053cba72baa86a028365e163049142105a0bb5cf73de551226f291503559801b33589861f296b53052bf177245385090ed23e884",
            "fd377a585a000004e6d6b4460200210116000000742fe5a3e007ff004f5d00221bc866dc0964e1a65c41c242374503896c16edd26d2624c79a97267651f7a49fdb006af37a0798364f94fe0eb3fb76b312760fae95a9f49c613d3892e917f59f6ae561f0a1ad7d6e5ab355671c000000f8a426152d37248b00016b801000000049cc9940b1c467fb020000000004595a",
        ] {
            let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
            assert_eq!(f.told("-", None, &bytes), "Dockerfile|FROM scratch\n");
            assert!(f.told("-", None, &bytes[..bytes.len() / 2]).starts_with("! the context on standard input cannot be unpacked: "));
        }
    }

    #[test]
    fn ignore_files() {
        let f = Fixture::new(&[
            ("a/Dockerfile", ""),
            ("a/.dockerignore", "general"),
            ("a/Other", ""),
            ("a/Other.dockerignore", "special"),
            ("out/D", ""),
            ("out/D.dockerignore", "outside"),
        ]);
        for (dockerfile, ignored) in [(None, "general"), (Some("a/Other"), "special"), (Some("out/D"), "outside"), (Some("-"), "general")] {
            let tree = f.fetch("a", dockerfile, b"FROM x").unwrap();
            for name in ["general", "special", "outside"] {
                assert_eq!(tree.contexts["context"].ignore.is_ignored(name), name == ignored, "{dockerfile:?} {name}");
            }
        }
    }

    #[test]
    fn named_contexts() {
        let f = Fixture::new(&[("a/Dockerfile", ""), ("n/.dockerignore", "x")]);
        let mut request = BuildRequest::new(Source::Path(f.dir.path().join("a")));
        request.contexts.insert("n".into(), ContextSource::Path(f.dir.path().join("n")));
        request.contexts.insert("i".into(), ContextSource::Image("docker-image://b".into()));
        let tree = fetched(&request, f.dir.path(), b"").unwrap();
        assert_eq!(tree.contexts.keys().collect::<Vec<_>>(), ["context", "n"]);
        assert!(tree.contexts["n"].ignore.is_ignored("x"));
        request.contexts.insert("n".into(), ContextSource::Path(f.dir.path().join("gone")));
        let error = fetched(&request, f.dir.path(), b"").unwrap_err().to_string();
        assert!(error.contains("build context \"n\"") && error.contains("does not exist"), "{error}");
    }

    /// One ustar entry; `link` makes it a symbolic link.
    fn entry(name: &str, link: Option<&str>, content: &str) -> Vec<u8> {
        let mut head = vec![0u8; 512];
        head[..name.len()].copy_from_slice(name.as_bytes());
        head[100..108].copy_from_slice(b"0000644\0");
        head[108..116].copy_from_slice(b"0000000\0");
        head[116..124].copy_from_slice(b"0000000\0");
        head[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
        head[136..148].copy_from_slice(b"00000000000\0");
        head[148..156].copy_from_slice(b"        ");
        head[156] = if link.is_some() { b'2' } else { b'0' };
        if let Some(link) = link {
            head[157..157 + link.len()].copy_from_slice(link.as_bytes());
        }
        head[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = head.iter().map(|b| u32::from(*b)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        head.extend_from_slice(content.as_bytes());
        head.resize(head.len().next_multiple_of(512), 0);
        head
    }

    #[test]
    fn tar_on_standard_input() {
        let f = Fixture::new(&[("secret", "FROM stolen")]);
        let end = vec![0; 1024];
        let tar = [entry("Dockerfile", None, "FROM t"), entry("sub/D", None, "FROM s"), end.clone()].concat();
        assert_eq!(f.told("-", None, &tar), "Dockerfile|FROM t");
        assert_eq!(f.told("-", Some("sub/D"), &tar), "sub/D|FROM s");
        assert!(f.told("-", Some("none"), &tar).starts_with("! there is no Dockerfile at none / did you mean `-f Dockerfile`?"));
        let outside = f.dir.path().join("secret").display().to_string();
        let hostile = [entry("Dockerfile", Some(&outside), ""), end].concat();
        assert!(f.told("-", None, &hostile).starts_with("! Dockerfile is a link to "));
        let gone = f.fetch("-", None, &tar).map(|tree| tree.contexts["context"].dir.clone()).unwrap();
        assert!(!gone.exists(), "an unpacked context is removed");
    }
}
