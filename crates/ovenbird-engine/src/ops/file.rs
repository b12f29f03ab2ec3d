//! `COPY`, `ADD`, `WORKDIR` without running anything: writes a new diff folder above a base.
//!
//! The rules are BuildKit's (its file operations and fsutil's copy): the destination's links are
//! followed inside the root, a folder gives its content, parents are made 0755 (or as an octal
//! `--chmod` says). What is written is an overlayfs diff: folders of the base on the way are copied
//! up with what the base says of them.

mod archive;
pub(crate) mod chmod;
mod dest;
pub(crate) mod owner;
pub(crate) mod select;
mod tar_reader;
pub(crate) mod transfer;

#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ovenbird_dockerfile::ignore::PatternError;
use ovenbird_oci::layer::{Owners, Ownership};

use crate::plan::{CopyAction, FileAction, FileOp, VertexId};
use crate::snapshot::Snapshot;
use crate::snapshot::tree::{self, Kind, Tree, clean};

pub use archive::decompress;
pub(crate) use dest::{Dest, Trail};
use select::Selected;
pub use transfer::Lent;
use transfer::Meta;

/// Why `COPY`, `ADD` or `WORKDIR` failed.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A source does not exist.
    #[error("{name:?}: not found{}", why.as_ref().map_or_else(String::new, ToString::to_string))]
    NotFound {
        /// As the Dockerfile names it, absolute.
        name: String,
        /// What is known of the reason.
        why: Option<Missing>,
    },
    /// A source exists, but is hidden.
    #[error("{name:?}: not found: it is there, but excluded by .dockerignore (pattern {pattern:?}); remove the pattern, or add `!{}`", name.trim_start_matches('/'))]
    Ignored {
        /// As the Dockerfile names it, absolute.
        name: String,
        /// The pattern that matches.
        pattern: String,
    },
    /// A wildcard or `--exclude` pattern cannot be read.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// `--chmod` cannot be read.
    #[error("--chmod={mode:?} is not a mode: {reason}; write octal digits (0755) or symbols (u=rwX,go=rX)")]
    Mode {
        /// As written.
        mode: String,
        /// Why.
        reason: &'static str,
    },
    /// `--chown` names somebody whom the image does not know.
    #[error("--chown={spec:?}: the image's {file} has no entry {name:?}; add it before this step, or give a number")]
    Owner {
        /// As written.
        spec: String,
        /// Which part.
        name: String,
        /// `/etc/passwd` or `/etc/group`.
        file: &'static str,
    },
    /// A folder is copied onto something else.
    #[error("cannot copy to non-directory: {path:?} exists in the image and is not a folder")]
    NotDirectory {
        /// In the image, absolute.
        path: String,
    },
    /// One file cannot be several.
    #[error(
        "when using COPY or ADD with more than one source file, the destination must be a directory and end with a /: {path:?} is a file"
    )]
    SeveralToOne {
        /// In the image, absolute.
        path: String,
    },
    /// A file is copied onto a folder.
    #[error("cannot replace the folder {path:?} with a file")]
    IsDirectory {
        /// In the image, absolute.
        path: String,
    },
    /// Links that never end.
    #[error("{path:?}: too many levels of symbolic links (more than 255)")]
    Links {
        /// Absolute.
        path: String,
    },
    /// Too deep, or too long a name.
    #[error("{0}; shorten it, or leave it out")]
    TooLong(String),
    /// A name that means something else in a layer.
    #[error(
        "cannot put {path:?} in an image: names that begin with .wh. mark removed files in layers; rename it, or leave it out (.dockerignore, --exclude)"
    )]
    Reserved {
        /// In the image, absolute.
        path: String,
    },
    /// An archive is damaged or hostile.
    #[error("cannot unpack {name:?}: {reason}")]
    Archive {
        /// The archive, as the Dockerfile names it.
        name: String,
        /// Why.
        reason: String,
    },
    /// A source cannot be read.
    #[error("cannot {action} {path:?}: {source}; make it readable for the user who builds, or leave it out (.dockerignore)")]
    Unreadable {
        /// What was tried.
        action: &'static str,
        /// In the place that is copied from, absolute.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Somebody changes the sources.
    #[error(
        "cannot {action} {path:?}: it was removed or replaced a moment ago; the context changed while it was read: build again when nobody writes to it"
    )]
    Changed {
        /// What was tried.
        action: &'static str,
        /// In the place that is copied from, absolute.
        path: String,
    },
    /// The machine refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what: a path of the machine, or one in the image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Why a source does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// Another name is nearly the same.
    #[error("; did you mean {near:?}?")]
    Near {
        /// Absolute.
        near: String,
    },
    /// A link leads nowhere.
    #[error(": {link:?} is a symbolic link to {target:?}, and links do not leave the place that is copied from; copy the file itself")]
    Link {
        /// The link, absolute.
        link: String,
        /// As the link says.
        target: String,
    },
}

impl FileError {
    /// [`FileError::io`] for what a step reads. A full disk or one that is read-only says nothing about the source.
    pub(crate) fn unreadable<E: Into<io::Error>>(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(E) -> Self {
        use rustix::io::Errno;
        move |error| match Self::io(action, path)(error) {
            Self::Io { action, path, source } => {
                let shown = Path::new("/").join(&path).display().to_string();
                match Errno::from_io_error(&source) {
                    Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::ROFS | Errno::NOMEM | Errno::MFILE | Errno::NFILE) => {
                        Self::Io { action, path, source }
                    }
                    // It was found, else nobody would read it.
                    Some(Errno::NOENT | Errno::NOTDIR | Errno::STALE) => Self::Changed { action, path: shown },
                    _ => Self::Unreadable { action, path: shown, source },
                }
            }
            other => other,
        }
    }

    /// [`FileError::unreadable`] for what was seen as a file or a link: when it is neither any more, somebody put something else there.
    pub(crate) fn replaced(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        use rustix::io::Errno;
        move |error| match Errno::from_io_error(&error) {
            Some(Errno::LOOP | Errno::NXIO | Errno::INVAL) => Self::unreadable(action, path)(Errno::NOENT),
            None if error.kind() == io::ErrorKind::InvalidInput => Self::unreadable(action, path)(Errno::NOENT),
            _ => Self::unreadable(action, path)(error),
        }
    }

    /// What a walk of the sources cannot read.
    pub(crate) fn walk(error: tree::WalkError) -> Self {
        Self::unreadable("read", error.path)(error.source)
    }

    /// For `map_err`: what was tried on what.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(E) -> Self {
        move |error| {
            let (path, source) = (path.as_ref(), error.into());
            if let Some(long) = source.get_ref().and_then(|inner| inner.downcast_ref::<tree::PathTooLong>()) {
                return Self::TooLong(long.to_string());
            }
            if source.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) {
                return Self::Links { path: absolute(path) };
            }
            Self::Io { action, path: path.to_owned(), source }
        }
    }
}

/// As people know it: with a slash in front.
pub(crate) fn absolute(path: &Path) -> String {
    format!("/{}", path.display())
}

/// Does what `op` says above `base` and writes the changes, in overlayfs form, into the existing empty folder `out`.
/// `source` gives the tree of a vertex. Returns the intended owners that the disk does not hold.
///
/// With `lent`, large files may get their size and no content: they are put there, to be read where they are, or settled.
pub fn apply(
    op: &FileOp,
    base: &Snapshot,
    source: &dyn Fn(VertexId) -> io::Result<Arc<dyn Tree>>,
    out: &Path,
    ownership: Ownership,
    lent: Option<&mut Vec<Lent>>,
) -> Result<Owners, FileError> {
    let mut dest = Dest::new(base, out, ownership)?;
    if lent.is_some() {
        dest.lend();
    }
    let mut sources = 0;
    for action in &op.actions {
        match action {
            FileAction::Copy(copy) => {
                let from = source(copy.from).map_err(FileError::unreadable("read the sources of", &copy.dest))?;
                copy_all(&mut dest, &*from, copy, &mut sources)?;
            }
            FileAction::Inline { name, content, dest: to, chown, chmod } => {
                next_source(&dest, to, &mut sources)?;
                inline(&mut dest, name, content, to, chown.as_deref(), chmod.as_deref())?;
            }
            FileAction::Mkdir { path, owner } => {
                let path = dest.resolve(Path::new(path))?;
                if dest.kind(&path)?.is_none() {
                    // `USER` may name somebody whom only a later step makes: root then, as in BuildKit.
                    let owner = owner.as_deref().map_or(Ok((0, 0)), |spec| owner::lookup(spec, dest.base())).unwrap_or((0, 0));
                    dest.make_dirs(&path, Made { owner, mode: DIR_MODE })?;
                } else if dest.kind(&path)? != Some(Kind::Dir) {
                    return Err(FileError::NotDirectory { path: absolute(&path) });
                }
            }
        }
    }
    if let Some(lent) = lent {
        *lent = dest.take_lent();
    }
    dest.finish()
}

/// Mode of folders that are made on the way, when nothing else is said.
const DIR_MODE: u32 = 0o755;

/// What folders get that are made on the way.
#[derive(Clone, Copy)]
pub(crate) struct Made {
    pub(crate) owner: (u32, u32),
    pub(crate) mode: u32,
}

impl Made {
    fn new(chown: Option<(u32, u32)>, chmod: Option<&chmod::Change>) -> Self {
        let mode = match chmod {
            Some(chmod::Change::Absolute(mode)) => *mode,
            // Symbols change what is there, and these folders come from nowhere.
            Some(chmod::Change::Symbolic(_)) | None => DIR_MODE,
        };
        Self { owner: chown.unwrap_or((0, 0)), mode }
    }
}

/// What a copy changes about what it copies.
struct Changes {
    /// `--chown`, else `None`.
    chown: Option<(u32, u32)>,
    chmod: Option<chmod::Change>,
    keep_owner: bool,
    default_mode: Option<u32>,
}

impl Changes {
    fn new(copy: &CopyAction, dest: &Dest) -> Result<Self, FileError> {
        Ok(Self {
            chown: copy.chown.as_deref().map(|spec| owner::lookup(spec, dest.base())).transpose()?,
            chmod: copy.chmod.as_deref().map(chmod::Change::parse).transpose()?,
            keep_owner: copy.keep_owner,
            default_mode: copy.default_mode,
        })
    }

    /// Folders that are made on the way, and a destination that was not there.
    fn parents(&self) -> Made {
        Made::new(self.chown, self.chmod.as_ref())
    }

    fn apply(&self, entry: &tree::Entry) -> Meta {
        let mode = match (&self.chmod, self.default_mode) {
            (Some(change), _) => change.apply(entry.mode, entry.is_dir()),
            (None, Some(mode)) if entry.kind == Kind::File => mode,
            _ => entry.mode,
        };
        let (uid, gid) = self.chown.unwrap_or(if self.keep_owner { (entry.uid, entry.gid) } else { (0, 0) });
        Meta { mode, uid, gid, mtime: Some(entry.mtime) }
    }
}

/// Counts a source of the instruction. It must not replace the file that the one before has become.
fn next_source(dest: &Dest, to: &str, sources: &mut usize) -> Result<(), FileError> {
    *sources += 1;
    if *sources > 1 && !names_folder(to) {
        let target = dest.resolve(&clean(to))?;
        if dest.kind(&target)?.is_some_and(|kind| kind != Kind::Dir) {
            return Err(FileError::SeveralToOne { path: absolute(&target) });
        }
    }
    Ok(())
}

fn names_folder(to: &str) -> bool {
    to.ends_with('/') || to.ends_with("/.") || to == "." || to.is_empty()
}

fn copy_all(dest: &mut Dest, from: &dyn Tree, copy: &CopyAction, sources: &mut usize) -> Result<(), FileError> {
    let changes = Changes::new(copy, dest)?;
    let selection = select::Selection::new(from, copy)?;
    for source in &selection.sources {
        if source.first {
            next_source(dest, &copy.dest, sources)?;
        }
        if copy.unpack && source.entry.kind == Kind::File && archive::unpack(dest, from, source, &copy.dest, changes.chown)? {
            continue;
        }
        copy_one(dest, from, &selection, source, &copy.dest, &changes)?;
    }
    Ok(())
}

/// Where the source goes: makes the folders on the way. `dest` is as written, with the slash at its end.
fn place(dest: &mut Dest, to: &str, is_dir: bool, name: &OsStr, parents: Made) -> Result<PathBuf, FileError> {
    let written = clean(to);
    let on_the_way = if names_folder(to) { written.as_path() } else { written.parent().unwrap_or(Path::new("")) };
    let on_the_way = dest.resolve(on_the_way)?;
    dest.make_dirs(&on_the_way, parents)?;
    let mut target = dest.resolve(&written)?;
    let existing = dest.kind(&target)?;
    if !is_dir && existing == Some(Kind::Dir) {
        target.push(name);
    }
    let needed = if is_dir && existing.is_none() { target.as_path() } else { target.parent().unwrap_or(Path::new("")) };
    dest.make_dirs(needed, parents)?;
    Ok(target)
}

fn copy_one(
    dest: &mut Dest,
    from: &dyn Tree,
    selection: &select::Selection,
    source: &Selected,
    to: &str,
    changes: &Changes,
) -> Result<(), FileError> {
    let is_dir = source.entry.is_dir();
    let target = place(dest, to, is_dir, &source.name, changes.parents())?;
    if is_dir && dest.kind(&target)? != Some(Kind::Dir) {
        return Err(FileError::NotDirectory { path: absolute(&target) });
    }
    let walk = selection.walk(from, source);
    dest.write(|dest, queue| {
        let mut open = Trail::default();
        for visit in walk {
            let visit = visit.map_err(FileError::walk)?;
            let meta = changes.apply(&visit.entry);
            if visit.depth == 0 {
                if visit.entry.is_dir() {
                    let handle = dest.dir(&target)?;
                    dest.change_time(&handle, visit.entry.mtime)?;
                    open.push(handle);
                } else {
                    let parent = dest.dir(target.parent().unwrap_or(Path::new("")))?;
                    let name = target.file_name().unwrap_or(OsStr::new("."));
                    put(dest, &parent, name, from, &visit, (changes, meta), queue)?;
                }
                continue;
            }
            let name = visit.path.file_name().unwrap_or(OsStr::new("."));
            let parent = open.back_to(dest, visit.depth - 1)?;
            if visit.entry.is_dir() {
                open.push(dest.put_dir(&parent, name, from, &visit, meta)?);
            } else {
                put(dest, &parent, name, from, &visit, (changes, meta), queue)?;
            }
        }
        Ok(())
    })
}

/// Anything but a folder.
fn put(
    dest: &mut Dest,
    parent: &Arc<dest::DirHandle>,
    name: &OsStr,
    from: &dyn Tree,
    visit: &tree::Visit,
    (changes, meta): (&Changes, Meta),
    queue: &mut transfer::Queue,
) -> Result<(), FileError> {
    match visit.entry.kind {
        // A layer holds no sockets. One of the context arrives as an empty file, as in BuildKit; one that a step left stays behind.
        Kind::Socket if !changes.keep_owner => dest.put_content(parent, name, &mut io::empty(), &[], meta),
        _ => dest.put(parent, name, from, visit, meta, queue),
    }
}

fn inline(dest: &mut Dest, name: &str, content: &str, to: &str, chown: Option<&str>, chmod: Option<&str>) -> Result<(), FileError> {
    let owner = chown.map_or(Ok((0, 0)), |spec| owner::lookup(spec, dest.base()))?;
    let chmod = chmod.map(chmod::Change::parse).transpose()?;
    let mode = chmod.as_ref().map_or(0o644, |change| change.apply(0o644, false));
    let name = clean(name);
    let target = place(dest, to, false, name.file_name().unwrap_or(OsStr::new("heredoc")), Made::new(Some(owner), chmod.as_ref()))?;
    let parent = dest.dir(target.parent().unwrap_or(Path::new("")))?;
    let meta = Meta { mode, uid: owner.0, gid: owner.1, mtime: None };
    dest.put_content(&parent, target.file_name().unwrap_or(OsStr::new(".")), &mut content.as_bytes(), &[], meta)
}
