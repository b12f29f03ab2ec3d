//! Starting programs.
//!
//! The kernel would take the interpreter of a script and the dynamic linker of a program from the machine. So scripts are taken apart
//! here, and a program with a linker runs from a copy whose header (`PT_INTERP`, of which only the kernel reads the place in the file)
//! names the step's linker by its path on the machine: everything else about the new process is the kernel's own doing.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use libc::c_int;

use super::memory::words;
use super::paths::Found;
use super::process::{After, Answered, Instead, Process, Program, SLOT, SLOTS, terminated};
use super::registers::{MACHINE, Registers};
use super::tracer::Tracer;
use crate::owners;

/// As much of a file as the kernel looks at (`BINPRM_BUF_SIZE`).
const HEAD: usize = 256;
/// Scripts whose interpreter is a script.
const SCRIPTS_MAX: usize = 5;
const ELF: &[u8] = b"\x7fELF";
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_INTERP: u32 = 3;
/// More program headers than any linker makes (the kernel takes what fits 64 KiB).
const PROGRAM_HEADERS_MAX: u16 = 1170;
/// A writer of another thread that is being copied may have the new file open for a moment.
const BUSY_TRIES: u32 = 500;
const BUSY_PAUSE: Duration = Duration::from_millis(2);

const AT_UID: u64 = 11;
const AT_EUID: u64 = 12;
const AT_GID: u64 = 13;
const AT_EGID: u64 = 14;
const AT_EXECFN: u64 = 31;

/// Room for the program's name, then the slots.
const NAME: u64 = libc::PATH_MAX as u64 + 16;
/// What is put between the arguments and their strings.
const RESERVED: u64 = (NAME + SLOTS as u64 * SLOT + 32) & !15;
/// Arguments and environment: pointers only.
const STACK_MAX: usize = 16 << 20;

/// Which content a copy was made of, and of which linker it tells.
#[derive(PartialEq, Eq, Hash)]
struct Original {
    inode: (u64, u64),
    changed: (i64, i64),
    linker: Vec<u8>,
}

/// Copies of programs, as long as the step runs.
pub(super) struct Programs {
    folder: PathBuf,
    copies: HashMap<Original, Vec<u8>>,
    busy: u32,
    /// Where a refusal is told: the step's own standard error.
    messages: File,
}

impl Programs {
    /// `folder` exists and belongs to this step alone.
    pub(super) fn new(folder: PathBuf, messages: File) -> Programs {
        Programs { folder, copies: HashMap::new(), busy: 0, messages }
    }

    /// Whether a program that could not be started for `ETXTBSY` is worth another attempt.
    pub(super) fn is_busy(&mut self, host: &[u8]) -> bool {
        let ours = Path::new(std::ffi::OsStr::from_bytes(host)).starts_with(&self.folder);
        self.busy += 1;
        if ours && self.busy < BUSY_TRIES {
            std::thread::sleep(BUSY_PAUSE);
        }
        ours && self.busy < BUSY_TRIES
    }

    fn copy(&mut self, file: &File, host: &[u8], header: u64, linker: Vec<u8>) -> io::Result<Vec<u8>> {
        let about = file.metadata()?;
        let key = Original { inode: (about.dev(), about.ino()), changed: (about.ctime(), about.ctime_nsec()), linker };
        if let Some(copy) = self.copies.get(&key) {
            return Ok(copy.clone());
        }
        // Its last name is what the process is called.
        let name = Path::new(std::ffi::OsStr::from_bytes(host)).file_name().unwrap_or_default();
        let folder = self.folder.join(self.copies.len().to_string());
        fs::create_dir(&folder)?;
        let path = folder.join(name);
        let mut copy = File::options().write(true).create_new(true).mode(0o700).open(&path)?;
        let mut source = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)))?;
        let size = io::copy(&mut source, &mut copy)?;
        copy.write_all(&terminated(&key.linker))?;
        copy.write_all_at(&size.to_le_bytes(), header + 8)?;
        copy.write_all_at(&(key.linker.len() as u64 + 1).to_le_bytes(), header + 32)?;
        let path = path.as_os_str().as_bytes().to_vec();
        self.copies.insert(key, path.clone());
        Ok(path)
    }
}

enum Kind {
    /// Interpreter and its argument.
    Script(Vec<u8>, Option<Vec<u8>>),
    /// Place of the header that names the linker, and its name.
    Linked(u64, Vec<u8>),
    Static,
}

impl Tracer {
    /// `execve`: `lists` are the addresses of arguments and environment, `first` is the number of the path's argument.
    pub(super) fn execute(&mut self, thread: i32, dir: c_int, at: u64, lists: [u64; 2], flags: c_int, first: usize) -> Answered {
        let name = self.memory(thread)?.read_string(at)?;
        let follow = flags & libc::AT_SYMLINK_NOFOLLOW == 0;
        let mut found = if name.is_empty() && flags & libc::AT_EMPTY_PATH != 0 {
            self.with_paths(thread, |paths, caller| paths.of_descriptor(caller, dir))?
        } else {
            self.find(thread, dir, &name, follow)?
        };
        let mut script = if name.is_empty() || (dir != libc::AT_FDCWD && !name.starts_with(b"/")) {
            format!("/dev/fd/{dir}").into_bytes()
        } else {
            name.clone()
        };
        if !name.is_empty() && script != name {
            script.push(b'/');
            script.extend_from_slice(&name);
        }
        let mut arguments: Vec<Vec<u8>> = Vec::new();
        for _ in 0..=SCRIPTS_MAX {
            let (file, looked) = self.open_program(thread, &found)?;
            match self.kind(&file)? {
                Kind::Script(interpreter, argument) => {
                    arguments.splice(
                        0..usize::from(!arguments.is_empty()),
                        [Some(interpreter.clone()), argument, Some(script)].into_iter().flatten(),
                    );
                    found = self.find(thread, libc::AT_FDCWD, &interpreter, true)?;
                    script = interpreter;
                }
                kind => {
                    let (uid, gid, _) = self.owner(&looked);
                    let program = Program {
                        path: found.guest.clone().unwrap_or_else(|| found.host.clone()),
                        name,
                        mode: looked.stx_mode.into(),
                        owner: (uid, gid),
                    };
                    let host = match kind {
                        Kind::Linked(header, linker) => {
                            let linker = self.find(thread, libc::AT_FDCWD, &linker, true)?;
                            self.open_program(thread, &linker)?;
                            self.programs
                                .copy(&file, &found.host, header, linker.host)
                                .map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?
                        }
                        _ => found.host,
                    };
                    let mut instead = Instead::path(first, host);
                    if !arguments.is_empty() {
                        let given = self.memory(thread)?.read_pointers(lists[0])?;
                        instead.list = Some((first + 1, arguments, given.into_iter().skip(1).collect()));
                    }
                    return Ok(instead.then(After::Program(Box::new(program))));
                }
            }
        }
        Err(libc::ELOOP)
    }

    fn open_program(&mut self, thread: i32, found: &Found) -> Result<(File, libc::statx), c_int> {
        let follow = found.host.starts_with(b"/proc/");
        let path = Path::new(std::ffi::OsStr::from_bytes(&found.host));
        loop {
            let looked = super::modes::look(&found.host, follow, owners::MASK);
            if let Ok(looked) = &looked {
                let mode = u32::from(looked.stx_mode);
                if mode & libc::S_IFMT != libc::S_IFREG || mode & 0o111 == 0 {
                    return Err(if mode & libc::S_IFMT == libc::S_IFLNK { libc::ELOOP } else { libc::EACCES });
                }
            }
            match looked.and_then(|looked| Ok((File::open(path).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?, looked))) {
                Err(libc::EACCES) if self.open_up(thread, std::slice::from_ref(&found.host)) => {}
                other => return other,
            }
        }
    }

    fn kind(&mut self, file: &File) -> Result<Kind, c_int> {
        let mut head = [0u8; HEAD];
        let size = read_up_to(file, &mut head, 0);
        if let Some(line) = head[..size].strip_prefix(b"#!") {
            return script(line).ok_or(libc::ENOEXEC);
        }
        if size < HEADER || !head.starts_with(ELF) {
            return Err(libc::ENOEXEC);
        }
        let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        if head[4] == CLASS_32 {
            // The step's own output is where this is looked for.
            let _ = self.programs.messages.write_all(
                b"ovenbird: this is a 32-bit program, which the traced isolation level cannot run; build where another level works\n",
            );
            return Err(libc::ENOEXEC);
        }
        if head[4] != CLASS_64 || half(18) != MACHINE || usize::from(half(54)) != PROGRAM_HEADER || half(56) > PROGRAM_HEADERS_MAX {
            return Err(libc::ENOEXEC);
        }
        let start = word(&head, 32);
        let mut headers = vec![0u8; usize::from(half(56)) * PROGRAM_HEADER];
        if read_up_to(file, &mut headers, start) != headers.len() {
            return Err(libc::ENOEXEC);
        }
        for (index, header) in headers.chunks_exact(PROGRAM_HEADER).enumerate() {
            if u32::from_le_bytes([header[0], header[1], header[2], header[3]]) == PT_INTERP {
                let (from, size) = (word(header, 8), word(header, 32));
                if !(2..=libc::PATH_MAX as u64).contains(&size) {
                    return Err(libc::ENOEXEC);
                }
                let mut linker = vec![0u8; size as usize];
                if read_up_to(file, &mut linker, from) != linker.len() || linker.pop() != Some(0) {
                    return Err(libc::ENOEXEC);
                }
                linker.truncate(linker.iter().position(|byte| *byte == 0).unwrap_or(linker.len()));
                return Ok(Kind::Linked(start + (index * PROGRAM_HEADER) as u64, linker));
            }
        }
        Ok(Kind::Static)
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    words(&bytes[at..at + 8])[0]
}

fn read_up_to(file: &File, into: &mut [u8], at: u64) -> usize {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], at.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    done
}

/// What follows `#!`: the interpreter and all the rest of the line as one argument.
fn script(line: &[u8]) -> Option<Kind> {
    let end = line.iter().position(|byte| *byte == b'\n');
    // A line that is cut off must at least name the whole interpreter.
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let cut = end.is_none() && line.len() == HEAD - 2;
    let line = &line[..end.unwrap_or(line.iter().position(|byte| *byte == 0).unwrap_or(line.len()))];
    let line = line.trim_ascii();
    let name_end = line.iter().position(blank).unwrap_or(line.len());
    if name_end == 0 || (cut && name_end == line.len()) {
        return None;
    }
    let argument = line[name_end..].trim_ascii();
    Some(Kind::Script(line[..name_end].to_vec(), (!argument.is_empty()).then(|| argument.to_vec())))
}

/// Makes room for us in the memory of a new program: its first stack frame moves down, away from the strings that it points to. Also tells
/// it the ids and the name that it is to believe. The address of the room.
pub(super) fn settle(thread: i32, process: &mut Process, name: &[u8]) -> Result<Option<u64>, c_int> {
    let error = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
    let mut registers = Registers::of(thread).map_err(error)?;
    let (user, group) = (process.credentials.user, process.credentials.group);
    let memory = process.memory()?;
    let stack = registers.stack();
    let mut size = 8 << 10;
    let (mut frame, auxiliary) = loop {
        let mut bytes = vec![0u8; size];
        let got = memory.read_some(stack, &mut bytes);
        let frame = words(&bytes[..got]);
        if let Some((start, end)) = auxiliary(&frame) {
            break (frame[..end].to_vec(), start);
        }
        if got < size || size >= STACK_MAX {
            return Ok(None);
        }
        size *= 2;
    };
    let new = stack.checked_sub(RESERVED).ok_or(libc::EFAULT)?;
    let room = (new + frame.len() as u64 * 8).next_multiple_of(16);
    for pair in frame[auxiliary..].chunks_exact_mut(2) {
        pair[1] = match pair[0] {
            AT_UID => user.real.into(),
            AT_EUID => user.effective.into(),
            AT_GID => group.real.into(),
            AT_EGID => group.effective.into(),
            AT_EXECFN if (name.len() as u64) < NAME => room,
            _ => continue,
        };
    }
    let bytes: Vec<u8> = frame.iter().flat_map(|word| word.to_ne_bytes()).collect();
    memory.write(new, &bytes)?;
    memory.write(room, &terminated(&name[..name.len().min(NAME as usize - 1)]))?;
    registers.set_stack(new);
    registers.give(thread).map_err(error)?;
    Ok(Some(room + NAME))
}

/// Where the auxiliary vector begins in the first stack frame, and where it ends.
fn auxiliary(frame: &[u64]) -> Option<(usize, usize)> {
    let environment = usize::try_from(*frame.first()?).ok()?.checked_add(2)?;
    let start = environment + frame.get(environment..)?.iter().position(|pointer| *pointer == 0)? + 1;
    let pairs = frame.get(start..)?.chunks_exact(2).position(|pair| pair[0] == 0)? + 1;
    Some((start, start + pairs * 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts() {
        let rows: [(&[u8], Option<(&str, Option<&str>)>); 8] = [
            (b"/bin/sh\nrest", Some(("/bin/sh", None))),
            (b" /usr/bin/env  python3 -u \n", Some(("/usr/bin/env", Some("python3 -u")))),
            (b"/bin/sh\t-e", Some(("/bin/sh", Some("-e")))),
            (b"/bin/sh\0", Some(("/bin/sh", None))),
            (b"\n", None),
            (b"   \n", None),
            (&[b'x'; HEAD - 2], None),
            (b"", None),
        ];
        for (line, want) in rows {
            let got = script(line).map(|kind| match kind {
                Kind::Script(name, argument) => {
                    (String::from_utf8(name).unwrap(), argument.map(|argument| String::from_utf8(argument).unwrap()))
                }
                _ => panic!("no script"),
            });
            assert_eq!(got, want.map(|(name, argument)| (name.to_owned(), argument.map(str::to_owned))), "{line:?}");
        }
    }

    #[test]
    fn frames() {
        let frame = [2, 100, 200, 0, 300, 0, 6, 4096, AT_UID, 5, 0, 0, 77];
        assert_eq!(auxiliary(&frame), Some((6, 12)));
        assert_eq!(auxiliary(&frame[..10]), None, "cut off");
        assert_eq!(auxiliary(&[u64::MAX, 0]), None);
        assert_eq!(auxiliary(&[]), None);
    }
}
