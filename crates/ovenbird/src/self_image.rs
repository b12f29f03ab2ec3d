//! An image of the running program itself, made offline: to run as the container of `--on container`, or anywhere else.
//!
//! It has the program, the loader and the libraries that it has mapped, the machine's certificate authorities, and nothing else: no shell,
//! no git (sources are fetched by the caller; `ADD` of a repository wants an image with git). It is built like any image, from a context
//! that is made here, so every output works.

use std::fs::{self, File};
use std::io::{self, Read as _, SeekFrom};
use std::path::{Path, PathBuf};

use ovenbird_oci::{Digest, beside};

use crate::error::{Error, Kind};
use crate::request::{BuildRequest, Source};

/// This program, also when its file was replaced meanwhile.
const SELF: &str = "/proc/self/exe";

/// Where the program is in the image.
const PROGRAM: &str = "usr/bin/ovenbird";

/// Where builds keep their state in the container.
pub(crate) const STATE: &str = "/var/lib/ovenbird";

/// Bundles of certificate authorities, as distributions have them.
const AUTHORITIES: [&str; 4] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem"];

/// Where the image looks for them.
const BUNDLE: &str = "etc/ssl/certs/ca-certificates.crt";

/// Files of the image: where they are there, and here.
#[derive(Debug)]
pub struct SelfImage {
    files: Vec<(PathBuf, PathBuf)>,
}

impl SelfImage {
    /// Finds out what belongs to it. Copies nothing.
    pub fn of_this_program() -> Result<Self, Error> {
        let cannot =
            |error: io::Error| Error::from_chain(Kind::Configuration, &error).while_doing("cannot find out what this program is made of");
        let mut files = vec![(PathBuf::from(PROGRAM), PathBuf::from(SELF))];
        if let Some(loader) = interpreter(&mut File::open(SELF).map_err(cannot)?).map_err(cannot)? {
            files.push((inside(&loader), loader));
            for library in mapped(&fs::read_to_string("/proc/self/maps").map_err(cannot)?, &fs::canonicalize(SELF).map_err(cannot)?) {
                files.push((inside(&library), library));
            }
        }
        files.extend(AUTHORITIES.iter().map(PathBuf::from).find(|path| path.is_file()).map(|path| (PathBuf::from(BUNDLE), path)));
        files.sort();
        files.dedup_by(|one, other| one.0 == other.0);
        Ok(Self { files })
    }

    /// A name that says the content: the same files, the same name.
    pub fn name(&self) -> Result<String, Error> {
        let mut all = String::from("1\n");
        for (place, file) in &self.files {
            let read = File::open(file).and_then(Digest::of_reader);
            let (digest, _) = read.map_err(|error| cannot_read(file, &error))?;
            all.extend([place.display().to_string(), format!(" {digest}\n")]);
        }
        Ok(format!("ovenbird-self:{}", &Digest::of(all.as_bytes()).hex()[..16]))
    }

    /// Does it lack certificate authorities, so that registries over HTTPS cannot be reached from it?
    pub fn lacks_authorities(&self) -> bool {
        !self.files.iter().any(|(place, _)| place == Path::new(BUNDLE))
    }

    /// Makes the context below `temp`, and the request that builds it.
    pub fn request(&self, temp: &Path) -> Result<(BuildRequest, beside::Folder), Error> {
        let cannot = |error: io::Error| {
            Error::from_chain(Kind::Configuration, &error).while_doing(format!("cannot make a build context in {}", temp.display()))
        };
        beside::clear(temp);
        let folder = beside::folder_in(temp).map_err(cannot)?;
        let root = folder.path().join("root");
        for place in ["tmp", "etc", STATE.trim_start_matches('/')] {
            fs::create_dir_all(root.join(place)).map_err(cannot)?;
        }
        for (place, file) in &self.files {
            let place = root.join(place);
            fs::create_dir_all(place.parent().unwrap_or(&root)).map_err(cannot)?;
            fs::copy(file, &place).map_err(|error| cannot_read(file, &error))?;
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/\n").map_err(cannot)?;
        fs::write(root.join("etc/group"), "root:x:0:\n").map_err(cannot)?;
        let dockerfile = format!(
            "FROM scratch\nCOPY --chmod=go+rX root /\nENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin OVENBIRD_ROOT={STATE} \
             SSL_CERT_FILE=/{BUNDLE}\nVOLUME {STATE}\nENTRYPOINT [\"/{PROGRAM}\"]\n"
        );
        fs::write(folder.path().join("Dockerfile"), dockerfile).map_err(cannot)?;
        let mut request = BuildRequest::new(Source::Path(folder.path().into()));
        // The same files, the same image.
        request.reproducible = true;
        Ok((request, folder))
    }
}

fn cannot_read(file: &Path, error: &io::Error) -> Error {
    Error::from_chain(Kind::Configuration, error).while_doing(format!("cannot copy {}", file.display()))
}

fn inside(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}

/// The loader that the program names; none when it is static. Source: elf(5), `Elf64_Ehdr` and `Elf64_Phdr`.
fn interpreter(program: &mut (impl io::Read + io::Seek)) -> io::Result<Option<PathBuf>> {
    const PT_INTERP: u32 = 3;
    let mut head = [0; 64];
    program.read_exact(&mut head)?;
    let little = head.starts_with(b"\x7fELF\x02\x01");
    if !little && !head.starts_with(b"\x7fELF\x02\x02") {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "it is not a 64-bit ELF file"));
    }
    // All numbers are read in the machine's order: it runs here.
    let number = |bytes: &[u8]| {
        let fold = |sum: u64, byte: &u8| (sum << 8) | u64::from(*byte);
        if little { bytes.iter().rev().fold(0, fold) } else { bytes.iter().fold(0, fold) }
    };
    let (table, size, count) = (number(&head[32..40]), number(&head[54..56]), number(&head[56..58]));
    for index in 0..count {
        let mut entry = [0; 56];
        program.seek(SeekFrom::Start(table.saturating_add(index.saturating_mul(size))))?;
        program.read_exact(&mut entry)?;
        if number(&entry[0..4]) == u64::from(PT_INTERP) {
            let (place, length) = (number(&entry[8..16]), number(&entry[32..40]).min(4096));
            let mut name = vec![];
            program.seek(SeekFrom::Start(place))?;
            program.take(length).read_to_end(&mut name)?;
            while name.pop_if(|last| *last == 0).is_some() {}
            return Ok(Some(PathBuf::from(String::from_utf8_lossy(&name).into_owned())));
        }
    }
    Ok(None)
}

/// Libraries that are mapped executable: those that the loader found, where it found them.
fn mapped(maps: &str, program: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = maps
        .lines()
        .filter(|line| line.split_whitespace().nth(1).is_some_and(|mode| mode.contains('x')))
        .filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])))
        .filter(|path| path != program && path.is_file())
        .collect();
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_program_needs() {
        let image = SelfImage::of_this_program().unwrap();
        let places: Vec<String> = image.files.iter().map(|(place, _)| place.display().to_string()).collect();
        assert!(places.contains(&PROGRAM.to_owned()));
        // The tests are linked dynamically or not: a loader never comes without libraries.
        let dynamic = interpreter(&mut File::open(SELF).unwrap()).unwrap().is_some();
        assert_eq!(places.iter().any(|place| place.contains("libc.so")), dynamic, "{places:?}");
        let (name, again) = (image.name().unwrap(), SelfImage::of_this_program().unwrap().name().unwrap());
        assert_eq!(name, again);
        assert!(name.parse::<ovenbird_oci::Reference>().is_ok(), "{name}");
        let temp = tempfile::tempdir().unwrap();
        let (request, folder) = image.request(temp.path()).unwrap();
        assert!(request.reproducible && folder.path().join("root").join(PROGRAM).is_file());
    }

    #[test]
    fn no_program() {
        for bytes in [&b"#!/bin/sh\n"[..], b"", &[0x7f, b'E', b'L', b'F', 1, 1], &[0; 200]] {
            assert!(interpreter(&mut io::Cursor::new(bytes)).is_err(), "{bytes:?}");
        }
        let mut wrong = vec![0u8; 64];
        wrong[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (wrong[32], wrong[56]) = (200, 9);
        assert!(interpreter(&mut io::Cursor::new(wrong)).is_err(), "a table beyond the end");
    }

    #[test]
    fn libraries() {
        let maps = "1-2 r--p 00000000 08:01 1 /bin/sh\n1-2 r-xp 00000000 08:01 1 /bin/sh\n1-2 rw-p 0 0 0 [stack]\n1-2 r-xp 0 00:00 0 [vdso]\n1-2 r-xp 0 0 0 /nowhere/x.so\n";
        assert_eq!(mapped(maps, Path::new("/usr/bin/other")), [PathBuf::from("/bin/sh")]);
        assert!(mapped(maps, Path::new("/bin/sh")).is_empty());
    }
}
