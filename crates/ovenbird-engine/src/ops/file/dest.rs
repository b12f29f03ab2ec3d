//! The tree that is being written: a base and a new diff folder above it.

use std::collections::HashMap;
use std::ffi::{CString, OsStr, OsString};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ovenbird_oci::layer::{Owners, Ownership};
use rustix::fs::{AtFlags, FileType, Mode, XattrFlags};
use rustix::io::Errno;

use super::transfer::{FileJob, Lent, Meta, Queue, Sink, copy_files, set_dir_xattrs};
use super::{FileError, Made, absolute};
use crate::snapshot::tree::{Entry, Kind, Location, Tree, Visit, check_length, open_dir_at, open_dir_path, resolve, resolve_parent};
use crate::snapshot::view::{OPAQUE, View, is_opaque, is_whiteout};
use crate::snapshot::{LayerDir, Snapshot};

/// Folders that stay open.
const MAX_HANDLES: usize = 64;

/// An open folder of the new diff.
pub(crate) struct DirHandle {
    path: PathBuf,
    fd: Arc<OwnedFd>,
    /// What the base has under this path shows through.
    merged: bool,
    /// Nothing is in it yet that the current copy did not put there.
    fresh: bool,
}

/// Set when everything is written, for writing into a folder changes its time.
#[derive(Debug, Clone, Copy)]
struct Final {
    mode: u32,
    mtime: Option<(i64, u32)>,
}

/// A later name of a file that is being copied.
struct Link {
    first: PathBuf,
    path: PathBuf,
}

/// The folders from where a walk began to where it is. Only the last ones stay open: a tree may be deeper than the limit of open files.
#[derive(Default)]
pub(crate) struct Trail(Vec<Step>);

enum Step {
    Open(Arc<DirHandle>),
    Closed { path: PathBuf, merged: bool, fresh: bool },
}

impl Trail {
    /// Goes down into a folder.
    pub(crate) fn push(&mut self, handle: Arc<DirHandle>) {
        self.0.push(Step::Open(handle));
        if let Some(above) = self.0.len().checked_sub(MAX_HANDLES + 1)
            && let Step::Open(handle) = &self.0[above]
        {
            let DirHandle { path, merged, fresh, .. } = &**handle;
            self.0[above] = Step::Closed { path: path.clone(), merged: *merged, fresh: *fresh };
        }
    }

    /// Goes up to the folder at a depth.
    pub(crate) fn back_to(&mut self, dest: &Dest, depth: usize) -> Result<Arc<DirHandle>, FileError> {
        self.0.truncate(depth + 1);
        match self.0.last_mut() {
            Some(Step::Open(handle)) => Ok(handle.clone()),
            Some(step @ Step::Closed { .. }) => {
                let Step::Closed { path, merged, fresh } = &*step else { return Err(FileError::io("open", "a folder")(Errno::NOENT)) };
                let fd = Arc::new(dest.open_path(path)?);
                let handle = Arc::new(DirHandle { path: path.clone(), fd, merged: *merged, fresh: *fresh });
                *step = Step::Open(handle.clone());
                Ok(handle)
            }
            None => Err(FileError::io("open", "a folder")(Errno::NOENT)),
        }
    }
}

/// A base, and the diff above it that is being written.
pub(crate) struct Dest {
    base: View,
    /// Base and diff together.
    now: View,
    root: Arc<OwnedFd>,
    sink: Arc<Sink>,
    finals: HashMap<PathBuf, Final>,
    handles: HashMap<PathBuf, Arc<DirHandle>>,
    /// Hard links within one source: device and inode → first path.
    firsts: HashMap<(u64, u64), PathBuf>,
    links: Vec<Link>,
}

impl Dest {
    /// Writes into the existing empty folder `out`, which gets the metadata of the base's root.
    pub(crate) fn new(base: &Snapshot, out: &Path, ownership: Ownership) -> Result<Self, FileError> {
        let root = Arc::new(open_dir_path(out).map_err(FileError::io("open", out))?);
        let mut layers = base.layers.clone();
        layers.push(LayerDir::growing(out));
        let mut dest = Self {
            base: View::new(base),
            now: View::new(&Snapshot { layers }),
            root: root.clone(),
            sink: Arc::new(Sink::new(ownership)),
            finals: HashMap::new(),
            handles: HashMap::new(),
            firsts: HashMap::new(),
            links: Vec::new(),
        };
        let top = dest.base.entry(Path::new("")).map_err(FileError::io("read", out))?;
        let meta = match &top {
            Some(entry) if !base.layers.is_empty() => Meta { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: Some(entry.mtime) },
            _ => Meta { mode: 0o755, uid: 0, gid: 0, mtime: None },
        };
        dest.describe_dir(&root, Path::new(""), meta)?;
        if top.is_some() && !base.layers.is_empty() {
            dest.copy_base_xattrs(&root, Path::new(""))?;
        }
        Ok(dest)
    }

    /// What is below the diff.
    pub(crate) fn base(&self) -> &dyn Tree {
        &self.base
    }

    /// Follows links inside the root as it is now.
    pub(crate) fn resolve(&self, path: &Path) -> Result<PathBuf, FileError> {
        self.now.forget();
        resolve(&self.now, path).map_err(FileError::io("follow", path))
    }

    /// A path whose last component is no link to follow, with another root: nothing outside of `root` is reached. Both are relative to
    /// the real root.
    pub(crate) fn resolve_below(&self, root: &Path, path: &Path) -> Result<PathBuf, FileError> {
        self.now.forget();
        let below = Below { tree: &self.now, root };
        let found = resolve_parent(&below, path).map_err(FileError::io("follow", path))?;
        Ok(if found.as_os_str().is_empty() { root.to_owned() } else { root.join(found) })
    }

    /// What a path is now, without following it.
    pub(crate) fn kind(&self, path: &Path) -> Result<Option<Kind>, FileError> {
        self.now.forget();
        Ok(self.now.entry(path).map_err(FileError::io("read", path))?.map(|entry| entry.kind))
    }

    /// Makes missing folders (0755) of a path without links.
    pub(crate) fn make_dirs(&mut self, path: &Path, made: Made) -> Result<(), FileError> {
        match self.kind(path)? {
            Some(Kind::Dir) => return Ok(()),
            Some(_) => return Err(FileError::NotDirectory { path: absolute(path) }),
            None => {}
        }
        let mut missing = vec![path];
        for folder in path.ancestors().skip(1) {
            match self.kind(folder)? {
                Some(Kind::Dir) => break,
                Some(_) => return Err(FileError::NotDirectory { path: absolute(folder) }),
                None => missing.push(folder),
            }
        }
        for folder in missing.into_iter().rev() {
            let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else { continue };
            let parent = self.dir(parent)?;
            self.new_dir(&parent, name, Meta { mode: made.mode, uid: made.owner.0, gid: made.owner.1, mtime: None })?;
        }
        // Only folders that a copy makes while it runs are known to hold nothing else.
        self.handles.clear();
        Ok(())
    }

    /// Opens an existing folder for writing into it; copies it up from the base when the diff does not have it.
    pub(crate) fn dir(&mut self, path: &Path) -> Result<Arc<DirHandle>, FileError> {
        let mut missing = Vec::new();
        let mut above = None;
        for folder in path.ancestors() {
            if let Some(handle) = self.handles.get(folder) {
                above = Some(handle.clone());
                break;
            }
            missing.push(folder);
        }
        let mut handle = match above {
            Some(handle) => handle,
            None => {
                missing.pop();
                let merged = !is_opaque(&self.root).map_err(FileError::io("read", path))?;
                self.keep(DirHandle { path: PathBuf::new(), fd: self.root.clone(), merged, fresh: false })
            }
        };
        while let Some(folder) = missing.pop() {
            handle = self.dir_in(&handle, folder)?;
        }
        Ok(handle)
    }

    /// [`Dest::dir`] in a folder that is open.
    fn dir_in(&mut self, parent: &DirHandle, path: &Path) -> Result<Arc<DirHandle>, FileError> {
        let name = path.file_name().unwrap_or(OsStr::new("."));
        let base = if parent.merged { self.base.entry(path).map_err(FileError::io("read", path))? } else { None };
        let in_base = base.as_ref().is_some_and(Entry::is_dir);
        let fd = match self.open_written(parent, name, path) {
            Ok(fd) => fd,
            Err(Errno::NOENT) if in_base => {
                let entry = base.ok_or(Errno::NOENT).map_err(FileError::io("read", path))?;
                rustix::fs::mkdirat(&parent.fd, name, Mode::RWXU).map_err(FileError::io("make", path))?;
                let fd = open_dir_at(&parent.fd, name).map_err(FileError::io("open", path))?;
                let meta = Meta { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: Some(entry.mtime) };
                self.describe_dir(&fd, path, meta)?;
                self.copy_base_xattrs(&fd, path)?;
                fd
            }
            Err(Errno::NOTDIR | Errno::LOOP) => return Err(FileError::NotDirectory { path: absolute(path) }),
            Err(error) => return Err(FileError::io("open", path)(error)),
        };
        let merged = in_base && !is_opaque(&fd).map_err(FileError::io("read", path))?;
        Ok(self.keep(DirHandle { path: path.to_owned(), fd: Arc::new(fd), merged, fresh: false }))
    }

    fn open_written(&mut self, parent: &DirHandle, name: &OsStr, path: &Path) -> Result<OwnedFd, Errno> {
        match open_dir_at(&parent.fd, name) {
            Err(Errno::ACCESS) => {
                // Our own folder, without the bits that an ordinary user needs to write into it.
                let stat = rustix::fs::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
                rustix::fs::chmodat(&parent.fd, name, Mode::RWXU, AtFlags::empty())?;
                let mtime = Some((stat.st_mtime, stat.st_mtime_nsec as u32));
                self.finals.entry(path.to_owned()).or_insert(Final { mode: stat.st_mode & 0o7777, mtime });
                open_dir_at(&parent.fd, name)
            }
            other => other,
        }
    }

    fn keep(&mut self, handle: DirHandle) -> Arc<DirHandle> {
        if self.handles.len() >= MAX_HANDLES {
            self.handles.clear();
        }
        let handle = Arc::new(handle);
        self.handles.insert(handle.path.clone(), handle.clone());
        handle
    }

    fn copy_base_xattrs(&self, fd: &OwnedFd, path: &Path) -> Result<(), FileError> {
        let Some(location) = self.base.locate(path).map_err(FileError::io("read", path))? else { return Ok(()) };
        let xattrs = location.xattrs().map_err(FileError::io("read the attributes of", path))?;
        set_dir_xattrs(fd, &xattrs).map_err(FileError::io("set the attributes of", path))
    }

    /// Owner and mode now, time at the end.
    fn describe_dir(&mut self, fd: &OwnedFd, path: &Path, meta: Meta) -> Result<(), FileError> {
        self.sink.owners().remove(path.as_os_str());
        self.sink.own(fd, OsStr::new("."), path, &meta)?;
        // Writable for us until the end.
        rustix::fs::fchmod(fd, Mode::from_raw_mode(meta.mode | 0o700)).map_err(FileError::io("set the mode of", path))?;
        self.finals.insert(path.to_owned(), Final { mode: meta.mode, mtime: meta.mtime });
        Ok(())
    }

    /// Makes a folder where nothing is, or where something was that [`Dest::clear`] removed.
    fn new_dir(&mut self, parent: &DirHandle, name: &OsStr, meta: Meta) -> Result<Arc<DirHandle>, FileError> {
        let path = parent.path.join(name);
        check_name(&path)?;
        self.clear(parent, name)?;
        rustix::fs::mkdirat(&parent.fd, name, Mode::RWXU).map_err(FileError::io("make", &path))?;
        let fd = open_dir_at(&parent.fd, name).map_err(FileError::io("open", &path))?;
        if parent.merged && self.base.entry(&path).map_err(FileError::io("read", &path))?.is_some() {
            rustix::fs::fsetxattr(&fd, OPAQUE, b"y", XattrFlags::empty()).map_err(FileError::io("mark as opaque", &path))?;
        }
        self.describe_dir(&fd, &path, meta)?;
        Ok(self.keep(DirHandle { path, fd: Arc::new(fd), merged: false, fresh: true }))
    }

    /// What a folder holds under a name now.
    fn find(&self, parent: &DirHandle, name: &OsStr) -> Result<Option<Kind>, FileError> {
        if parent.fresh && !parent.merged {
            return Ok(None);
        }
        let path = parent.path.join(name);
        match rustix::fs::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if is_whiteout(&stat) => Ok(None),
            Ok(stat) => Ok(Some(Kind::of(&stat))),
            Err(Errno::NOENT) if parent.merged => Ok(self.base.entry(&path).map_err(FileError::io("read", &path))?.map(|entry| entry.kind)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(FileError::io("read", path)(error)),
        }
    }

    /// Removes what the diff itself holds under a name, whiteouts too. The base's entry is hidden by what takes its place.
    fn clear(&mut self, parent: &DirHandle, name: &OsStr) -> Result<(), FileError> {
        if parent.fresh {
            return Ok(());
        }
        let path = parent.path.join(name);
        match rustix::fs::unlinkat(&parent.fd, name, AtFlags::empty()) {
            Ok(()) => {
                self.sink.owners().remove(path.as_os_str());
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {
                let c_name = CString::new(name.as_bytes()).map_err(FileError::io("remove", &path))?;
                ovenbird_oci::layer::remove(parent.fd.as_fd(), &c_name).map_err(FileError::io("remove", &path))?;
                self.sink.owners().retain(|key, _| !Path::new(key).starts_with(&path));
                self.finals.retain(|key, _| !key.starts_with(&path));
                self.handles.retain(|key, _| !key.starts_with(&path));
                Ok(())
            }
            Err(error) => Err(FileError::io("remove", path)(error)),
        }
    }

    /// Folder of a copy: made, or merged into what is there.
    pub(crate) fn put_dir(
        &mut self,
        parent: &DirHandle,
        name: &OsStr,
        from: &dyn Tree,
        visit: &Visit,
        meta: Meta,
    ) -> Result<Arc<DirHandle>, FileError> {
        let handle = match self.find(parent, name)? {
            None => self.new_dir(parent, name, meta)?,
            Some(Kind::Dir) => {
                let handle = self.dir(&parent.path.join(name))?;
                if visit.partial {
                    self.change_mode(&handle, meta.mode)?;
                    return Ok(handle);
                }
                self.describe_dir(&handle.fd, &handle.path, meta)?;
                handle
            }
            Some(_) => return Err(FileError::NotDirectory { path: absolute(&parent.path.join(name)) }),
        };
        if let Some(location) = from.locate(&visit.path).map_err(FileError::unreadable("read", &visit.path))? {
            let xattrs = location.xattrs().map_err(FileError::unreadable("read the attributes of", &visit.path))?;
            set_dir_xattrs(&handle.fd, &xattrs).map_err(FileError::io("set the attributes of", &handle.path))?;
        }
        Ok(handle)
    }

    /// Gives the root of the diff itself the metadata of an entry.
    pub(crate) fn describe_root(&mut self, from: &dyn Tree, visit: &Visit, meta: Meta) -> Result<Arc<DirHandle>, FileError> {
        let handle = self.dir(Path::new(""))?;
        self.describe_dir(&handle.fd, Path::new(""), meta)?;
        if let Some(location) = from.locate(&visit.path).map_err(FileError::unreadable("read", &visit.path))? {
            let xattrs = location.xattrs().map_err(FileError::unreadable("read the attributes of", &visit.path))?;
            set_dir_xattrs(&handle.fd, &xattrs).map_err(FileError::unreadable("set the attributes of", &visit.path))?;
        }
        Ok(handle)
    }

    /// Marks a folder of the diff: nothing of the base shows through.
    pub(crate) fn mark_opaque(&mut self, path: &Path) -> Result<(), FileError> {
        let handle = self.dir(path)?;
        rustix::fs::fsetxattr(&handle.fd, OPAQUE, b"y", XattrFlags::empty()).map_err(FileError::io("mark as opaque", path))
    }

    /// Gives a folder of the output another mode.
    pub(crate) fn change_mode(&mut self, handle: &DirHandle, mode: u32) -> Result<(), FileError> {
        rustix::fs::fchmod(&handle.fd, Mode::from_raw_mode(mode | 0o700)).map_err(FileError::io("set the mode of", &handle.path))?;
        self.sink.forget_mode(&handle.path);
        let stat = rustix::fs::fstat(&handle.fd).map_err(FileError::io("read", &handle.path))?;
        let time = Some((stat.st_mtime, stat.st_mtime_nsec as u32));
        self.finals.entry(handle.path.clone()).or_insert(Final { mode, mtime: time }).mode = mode;
        Ok(())
    }

    /// Gives a folder of the output another time.
    pub(crate) fn change_time(&mut self, handle: &DirHandle, mtime: (i64, u32)) -> Result<(), FileError> {
        if !self.finals.contains_key(&handle.path) {
            let stat = rustix::fs::fstat(&handle.fd).map_err(FileError::io("read", &handle.path))?;
            self.finals.insert(handle.path.clone(), Final { mode: stat.st_mode & 0o7777, mtime: None });
        }
        if let Some(last) = self.finals.get_mut(&handle.path) {
            last.mtime = Some(mtime);
        }
        Ok(())
    }

    /// Anything but a folder.
    pub(crate) fn put(
        &mut self,
        parent: &Arc<DirHandle>,
        name: &OsStr,
        from: &dyn Tree,
        visit: &Visit,
        meta: Meta,
        queue: &mut Queue,
    ) -> Result<(), FileError> {
        let path = parent.path.join(name);
        let entry = &visit.entry;
        if entry.kind == Kind::Socket {
            return Ok(());
        }
        self.make_room(parent, name, &path)?;
        let located = || from.locate(&visit.path).map_err(FileError::unreadable("read", &visit.path));
        let location = located()?.ok_or(Errno::NOENT).map_err(FileError::unreadable("read", &visit.path))?;
        match entry.kind {
            Kind::Dir => return Err(FileError::IsDirectory { path: absolute(&path) }),
            Kind::Socket => {}
            Kind::Symlink => {
                let target = location.read_link().map_err(FileError::replaced("read", &visit.path))?;
                self.sink.make_symlink(&parent.fd, name, &path, &target, &meta)?;
            }
            Kind::Char(major, minor) => self.sink.make_node(&parent.fd, name, &path, FileType::CharacterDevice, (major, minor), &meta)?,
            Kind::Block(major, minor) => self.sink.make_node(&parent.fd, name, &path, FileType::BlockDevice, (major, minor), &meta)?,
            Kind::Fifo => self.sink.make_node(&parent.fd, name, &path, FileType::Fifo, (0, 0), &meta)?,
            Kind::File => {
                let (device, inode, count) = entry.inode;
                if count > 1 {
                    // A hard link counts within one source only, as in BuildKit.
                    if let Some(first) = self.firsts.get(&(device, inode)) {
                        let first = first.clone();
                        self.links.push(Link { first, path });
                        return Ok(());
                    }
                    self.firsts.insert((device, inode), path.clone());
                }
                return queue.push(FileJob {
                    source: visit.path.clone(),
                    from: location,
                    meta,
                    size: entry.size,
                    into: parent.fd.clone(),
                    name: name.to_owned(),
                    path,
                });
            }
        }
        Ok(())
    }

    fn make_room(&mut self, parent: &DirHandle, name: &OsStr, path: &Path) -> Result<(), FileError> {
        check_name(path)?;
        match self.find(parent, name)? {
            Some(Kind::Dir) => Err(FileError::IsDirectory { path: absolute(path) }),
            _ => self.clear(parent, name),
        }
    }

    /// Runs `action`, which writes; then waits for the copying threads and makes the hard links.
    pub(crate) fn write(&mut self, action: impl FnOnce(&mut Self, &mut Queue) -> Result<(), FileError>) -> Result<(), FileError> {
        let sink = self.sink.clone();
        self.firsts.clear();
        copy_files(&sink, |queue| action(self, queue))?;
        for link in std::mem::take(&mut self.links) {
            self.link_written(&link.first, &link.path)?;
        }
        // Later copies must look before they write.
        self.handles.clear();
        Ok(())
    }

    fn link_written(&self, first: &Path, path: &Path) -> Result<(), FileError> {
        let open_parent = |of: &Path| self.open_path(of.parent().unwrap_or(Path::new("")));
        let (from, into) = (open_parent(first)?, open_parent(path)?);
        let name = |of: &Path| of.file_name().unwrap_or(OsStr::new(".")).to_owned();
        rustix::fs::linkat(&from, name(first), &into, name(path), AtFlags::empty()).map_err(FileError::io("link", path))?;
        self.sink.copy_record(first, path);
        Ok(())
    }

    /// Opens a folder of the diff itself.
    fn open_path(&self, path: &Path) -> Result<OwnedFd, FileError> {
        let open = || {
            let mut fd = open_dir_at(&self.root, OsStr::new("."))?;
            for name in path {
                fd = open_dir_at(&fd, name)?;
            }
            Ok::<_, Errno>(fd)
        };
        open().map_err(FileError::io("open", path))
    }

    /// A file with this content; replaces whatever is there but a folder.
    pub(crate) fn put_content(
        &mut self,
        parent: &DirHandle,
        name: &OsStr,
        content: &mut dyn Read,
        xattrs: &[(OsString, Vec<u8>)],
        meta: Meta,
    ) -> Result<(), FileError> {
        let path = parent.path.join(name);
        self.make_room(parent, name, &path)?;
        self.sink.write(&parent.fd, name, &path, content, xattrs, &meta)
    }

    // What follows is for archives, whose entries replace anything.

    /// Makes a folder, or gives the one that is there this metadata.
    pub(crate) fn replace_with_dir(&mut self, path: &Path, xattrs: &[(OsString, Vec<u8>)], meta: Meta) -> Result<(), FileError> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
        let parent = self.dir(parent)?;
        let handle = if self.find(&parent, name)? == Some(Kind::Dir) {
            let handle = self.dir(path)?;
            self.describe_dir(&handle.fd, path, meta)?;
            handle
        } else {
            let handle = self.new_dir(&parent, name, meta)?;
            // Entries of an archive may come twice: its folders are never known to be empty.
            self.handles.clear();
            handle
        };
        set_dir_xattrs(&handle.fd, xattrs).map_err(FileError::io("set the attributes of", path))
    }

    /// Makes room at a path and gives its folder and name.
    fn replace(&mut self, path: &Path) -> Result<(Arc<DirHandle>, OsString), FileError> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(FileError::IsDirectory { path: absolute(path) });
        };
        check_name(path)?;
        let parent = self.dir(parent)?;
        self.clear(&parent, name)?;
        Ok((parent, name.to_owned()))
    }

    pub(crate) fn replace_with_file(
        &mut self,
        path: &Path,
        content: &mut dyn Read,
        xattrs: &[(OsString, Vec<u8>)],
        meta: Meta,
    ) -> Result<(), FileError> {
        let (parent, name) = self.replace(path)?;
        self.sink.write(&parent.fd, &name, path, content, xattrs, &meta)
    }

    pub(crate) fn replace_with_symlink(&mut self, path: &Path, target: &Path, meta: Meta) -> Result<(), FileError> {
        let (parent, name) = self.replace(path)?;
        self.sink.make_symlink(&parent.fd, &name, path, target, &meta)
    }

    pub(crate) fn replace_with_node(&mut self, path: &Path, kind: FileType, device: (u32, u32), meta: Meta) -> Result<(), FileError> {
        let (parent, name) = self.replace(path)?;
        self.sink.make_node(&parent.fd, &name, path, kind, device, &meta)
    }

    /// Another name for an existing file; a file of the base is copied up first, so that both are in the diff.
    pub(crate) fn replace_with_link(&mut self, path: &Path, first: &Path) -> Result<(), FileError> {
        if path == first {
            return Ok(());
        }
        let (Some(holder), Some(source)) = (first.parent(), first.file_name()) else {
            return Err(FileError::IsDirectory { path: absolute(first) });
        };
        let holder = self.dir(holder)?;
        match rustix::fs::statat(&holder.fd, source, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => {}
            Err(Errno::NOENT) => self.copy_up(&holder, source, first)?,
            Err(error) => return Err(FileError::io("read", first)(error)),
        }
        let (parent, name) = self.replace(path)?;
        rustix::fs::linkat(&holder.fd, source, &parent.fd, &name, AtFlags::empty()).map_err(FileError::io("link", path))?;
        self.sink.copy_record(first, path);
        Ok(())
    }

    fn copy_up(&mut self, holder: &Arc<DirHandle>, name: &OsStr, path: &Path) -> Result<(), FileError> {
        let read = FileError::io("read", path);
        let entry = match self.base.entry(path) {
            Ok(Some(entry)) if holder.merged => entry,
            Ok(_) => return Err(read(Errno::NOENT.into())),
            Err(error) => return Err(read(error)),
        };
        let location =
            self.base.locate(path).map_err(FileError::io("read", path))?.ok_or(Errno::NOENT).map_err(FileError::io("read", path))?;
        let meta = Meta { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: Some(entry.mtime) };
        match entry.kind {
            Kind::File => self.sink.copy(&FileJob {
                source: path.to_owned(),
                from: location,
                meta,
                size: entry.size,
                into: holder.fd.clone(),
                name: name.to_owned(),
                path: path.to_owned(),
            }),
            Kind::Symlink => {
                let target = location.read_link().map_err(FileError::io("read", path))?;
                self.sink.make_symlink(&holder.fd, name, path, &target, &meta)
            }
            _ => Err(read(Errno::PERM.into())),
        }
    }

    /// Says that nothing is here any more, in overlayfs' way.
    pub(crate) fn put_whiteout(&mut self, path: &Path) -> Result<(), FileError> {
        let (parent, name) = self.replace(path)?;
        rustix::fs::mknodat(&parent.fd, &name, FileType::CharacterDevice, Mode::empty(), 0)
            .map_err(FileError::io("make a whiteout for", path))
    }

    /// Lets the content of large files stay where it is; before anything is written.
    pub(crate) fn lend(&mut self) {
        self.sink = Arc::new(Sink::lending(self.sink.ownership()));
    }

    /// What was lent.
    pub(crate) fn take_lent(&self) -> Vec<Lent> {
        self.sink.take_lent()
    }

    /// Gives folders their last modes and times. Returns the owners that the disk does not hold.
    pub(crate) fn finish(mut self) -> Result<Owners, FileError> {
        self.handles.clear();
        let mut finals: Vec<_> = self.finals.drain().collect();
        // Deepest first: a folder without its x bit must not be gone through again.
        finals.sort_unstable_by(|a, b| b.0.cmp(&a.0));
        for (path, last) in &finals {
            let name = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            let meta = Meta { mode: last.mode, uid: 0, gid: 0, mtime: last.mtime };
            // Every component is a folder that we made, so there is no link to follow.
            let mut done = Ok(());
            if last.mtime.is_some() {
                done = rustix::fs::utimensat(&self.root, name, &meta.times(), AtFlags::SYMLINK_NOFOLLOW);
            }
            let mode = self.sink.folder_mode(path, last.mode);
            if done.is_ok() && mode & 0o700 != 0o700 {
                done = rustix::fs::chmodat(&self.root, name, Mode::from_raw_mode(mode), AtFlags::empty());
            }
            match done {
                Ok(()) => {}
                Err(Errno::NAMETOOLONG) => {
                    let fd = self.open_path(path)?;
                    if last.mtime.is_some() {
                        rustix::fs::futimens(&fd, &meta.times()).map_err(FileError::io("set the time of", path))?;
                    }
                    rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode)).map_err(FileError::io("set the mode of", path))?;
                }
                Err(error) => return Err(FileError::io("set the time of", path)(error)),
            }
        }
        let owners = std::mem::take(&mut *self.sink.owners());
        Ok(owners)
    }
}

/// A folder of a tree as a root, by reference.
struct Below<'a> {
    tree: &'a View,
    root: &'a Path,
}

impl Below<'_> {
    fn at(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() { self.root.to_owned() } else { self.root.join(path) }
    }
}

impl Tree for Below<'_> {
    fn entry(&self, path: &Path) -> std::io::Result<Option<Entry>> {
        self.tree.entry(&self.at(path))
    }
    fn names(&self, dir: &Path) -> std::io::Result<Vec<OsString>> {
        self.tree.names(&self.at(dir))
    }
    fn locate(&self, path: &Path) -> std::io::Result<Option<Location>> {
        self.tree.locate(&self.at(path))
    }
}

/// Can a layer hold it?
fn check_name(path: &Path) -> Result<(), FileError> {
    check_length(path).map_err(FileError::io("make", path))?;
    if path.file_name().is_some_and(|name| name.as_bytes().starts_with(b".wh.")) {
        return Err(FileError::Reserved { path: absolute(path) });
    }
    Ok(())
}
