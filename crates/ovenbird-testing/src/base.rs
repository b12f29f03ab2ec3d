//! Base images made on this machine from Debian packages, never pulled.
//!
//! Both are kept in the cache (see [`crate::cache`]) twice: as an OCI layout and as the storage of a registry that holds them, so
//! that a registry with base images starts in a tenth of a second.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::registry::Registry;
use crate::{AtPath, Error, Result, cache, process};

/// Part of every cache key: raise it when what is built here changes.
const FORMAT: u32 = 1;

/// `PATH` of the images, and of `FROM scratch` as BuildKit sets it.
pub const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A base image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// `library/busybox:latest`: busybox-static with a link for each applet; users root, daemon, bin, app (1000), nobody.
    Busybox,
    /// `library/debian:latest` and `:CODENAME`: debootstrap's minbase of the machine's release, with the machine's mirror.
    Debian,
}

impl Base {
    /// Repository on Docker Hub that it stands for.
    pub fn repository(self) -> &'static str {
        match self {
            Self::Busybox => "library/busybox",
            Self::Debian => "library/debian",
        }
    }

    /// Folder of the OCI layout; made on first use (busybox: a second; Debian: minutes).
    pub fn layout(self) -> Result<PathBuf> {
        cache::entry(&format!("layout-{}", self.key()?), |dir| match self {
            Self::Busybox => busybox(dir),
            Self::Debian => debian(dir),
        })
    }

    /// Diff ids of its layers.
    pub fn diff_ids(self) -> Result<Vec<String>> {
        let path = self.layout()?.join("config.json");
        let config: Value = serde_json::from_slice(&fs::read(&path).at("cannot read", &path)?)
            .map_err(|error| Error::Malformed { place: path.display().to_string(), reason: error.to_string() })?;
        let ids = config["rootfs"]["diff_ids"].as_array().into_iter().flatten();
        Ok(ids.filter_map(Value::as_str).map(str::to_owned).collect())
    }

    /// Is the layout there already?
    pub fn is_cached(self) -> bool {
        let key = self.key().ok();
        cache::dir().ok().zip(key).is_some_and(|(dir, key)| dir.join(format!("layout-{key}")).exists())
    }

    /// Storage folder of a registry that holds just this image.
    pub(crate) fn registry_storage(self) -> Result<PathBuf> {
        let layout = self.layout()?;
        cache::entry(&format!("registry-{}", self.key()?), |dir| {
            let registry = Registry::start_on(dir)?;
            let mut tags = vec!["latest".to_owned()];
            if self == Self::Debian {
                tags.push(codename()?);
            }
            for tag in tags {
                registry.push(&format!("oci:{}", layout.display()), &format!("{}:{tag}", self.repository()))?;
            }
            Ok(())
        })
    }

    fn key(self) -> Result<String> {
        Ok(match self {
            Self::Busybox => {
                let mut query = Command::new("dpkg-query");
                let version = process::output(query.args(["-W", "-f", "${Version}", "busybox-static"]))?;
                format!("busybox-{FORMAT}-{}", version.replace(':', "_"))
            }
            Self::Debian => format!("debian-{FORMAT}-{}", codename()?),
        })
    }
}

/// The machine's Debian mirror: the first source of its own release.
pub fn mirror() -> Option<String> {
    let codename = codename().ok()?;
    let mut targets = Command::new("apt-get");
    targets.args(["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]);
    let text = process::output(&mut targets).ok()?;
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields.len() == 3 && fields[1] == codename && fields[2] == "main").then(|| fields[0].to_owned())
    })
}

fn codename() -> Result<String> {
    let path = Path::new("/etc/os-release");
    let text = fs::read_to_string(path).at("cannot read", path)?;
    let found = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    found.map(|name| name.trim_matches('"').to_owned()).ok_or_else(|| Error::Missing("this machine is no Debian release".into()))
}

/// Users of the busybox image; `app` has a home and a second group.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nbin:x:2:2:bin:/bin:/bin/false\n\
                      app:x:1000:1000::/home/app:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n";
const GROUP: &str = "root:x:0:\ndaemon:x:1:\nbin:x:2:\nstaff:x:50:\napp:x:1000:\nshared:x:2000:app\nnogroup:x:65534:\n";

fn busybox(dir: &Path) -> Result<()> {
    let list = process::output(Command::new("busybox").arg("--list-full"))?;
    let program = ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(Path::new).find(|path| path.is_file());
    let program = program.ok_or_else(|| Error::Missing("/bin/busybox is missing (Debian package busybox-static)".into()))?;
    let place = Path::new("the busybox layer");
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: &str, kind: tar::EntryType, mode: u32, owner: u64, body: &[u8], link: &str| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(0);
        header.set_size(body.len() as u64);
        if !link.is_empty() {
            header.set_link_name(link)?;
        }
        tar.append_data(&mut header, path, body)
    };
    let folders = "bin dev etc home lib proc run sbin sys usr usr/bin usr/lib usr/sbin var var/log var/spool";
    let result = (|| {
        for folder in folders.split(' ') {
            add(folder, tar::EntryType::Directory, 0o755, 0, b"", "")?;
        }
        add("home/app", tar::EntryType::Directory, 0o755, 1000, b"", "")?;
        add("root", tar::EntryType::Directory, 0o700, 0, b"", "")?;
        add("tmp", tar::EntryType::Directory, 0o1777, 0, b"", "")?;
        add("var/tmp", tar::EntryType::Directory, 0o1777, 0, b"", "")?;
        add("etc/passwd", tar::EntryType::Regular, 0o644, 0, PASSWD.as_bytes(), "")?;
        add("etc/group", tar::EntryType::Regular, 0o644, 0, GROUP.as_bytes(), "")?;
        add("bin/busybox", tar::EntryType::Regular, 0o755, 0, &fs::read(program)?, "")?;
        for applet in list.lines().filter(|line| *line != "bin/busybox" && !line.starts_with("linuxrc")) {
            add(applet, tar::EntryType::Symlink, 0o777, 0, b"", "/bin/busybox")?;
        }
        Ok(())
    })();
    result.at("cannot write", place)?;
    let bytes = tar.into_inner().at("cannot write", place)?;
    write_layout(dir, &mut bytes.as_slice(), "sh")
}

fn debian(dir: &Path) -> Result<()> {
    let codename = codename()?;
    let mirror = mirror().ok_or_else(|| Error::Missing("apt knows no Debian source for this release".into()))?;
    let work = tempfile::Builder::new().prefix("ovenbird-debian-").tempdir().at("cannot make a folder in", &std::env::temp_dir())?;
    let root = work.path().join("root");
    process::output(Command::new("debootstrap").args(["--variant=minbase", &codename]).arg(&root).arg(&mirror))?;
    // What the machine needs to reach its mirror, the image needs too.
    let settings: String = process::output(Command::new("apt-config").arg("dump"))?
        .lines()
        .filter(|line| {
            ["Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries"].iter().any(|start| line.starts_with(start))
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let file = root.join("etc/apt/apt.conf.d/90machine");
    fs::write(&file, settings).at("cannot write", &file)?;
    let tar = work.path().join("layer.tar");
    let mut pack = Command::new("tar");
    pack.args(["--create", "--sort=name", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--one-file-system", "--exclude=./dev/*"])
        .args(["--exclude=./var/cache/apt/*.bin", "--exclude=./var/cache/apt/archives/*.deb", "--exclude=./var/lib/apt/lists/*_*"]);
    process::output(pack.arg("--file").arg(&tar).arg("--directory").arg(&root).arg("."))?;
    write_layout(dir, &mut File::open(&tar).at("cannot read", &tar)?, "bash")
}

/// Writes a layout of one layer; beside it `config.json`, a copy of the config blob.
fn write_layout(dir: &Path, layer: &mut dyn Read, command: &str) -> Result<()> {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).at("cannot make", &blobs)?;
    let half = dir.join("layer");
    let mut plain = Sha256::new();
    let mut gzip = flate2::write::GzEncoder::new(File::create(&half).at("cannot make", &half)?, flate2::Compression::fast());
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = layer.read(&mut buffer).at("cannot read the layer for", dir)?;
        if count == 0 {
            break;
        }
        plain.update(&buffer[..count]);
        gzip.write_all(&buffer[..count]).at("cannot write", &half)?;
    }
    gzip.finish().at("cannot write", &half)?;
    let packed = fs::read(&half).at("cannot read", &half)?;
    fs::remove_file(&half).at("cannot remove", &half)?;
    let blob = |bytes: &[u8]| -> Result<Value> {
        let digest = hex(Sha256::digest(bytes).as_slice());
        let path = blobs.join(&digest);
        fs::write(&path, bytes).at("cannot write", &path)?;
        Ok(json!({"digest": format!("sha256:{digest}"), "size": bytes.len()}))
    };
    let typed = |mut descriptor: Value, kind: &str| {
        descriptor["mediaType"] = format!("application/vnd.oci.image.{kind}").into();
        descriptor
    };
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "created": "2024-01-01T00:00:00Z", "architecture": architecture, "os": "linux",
        "config": {"Env": [DEFAULT_PATH], "Cmd": [command]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", hex(plain.finalize().as_slice()))]},
        "history": [{"created": "2024-01-01T00:00:00Z", "created_by": "base image of the tests"}],
    });
    let config = serde_json::to_vec(&config).unwrap_or_default();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": typed(blob(&config)?, "config.v1+json"),
        "layers": [typed(blob(&packed)?, "layer.v1.tar+gzip")],
    });
    let manifest = typed(blob(&serde_json::to_vec(&manifest).unwrap_or_default())?, "manifest.v1+json");
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    for (name, bytes) in [
        ("index.json", serde_json::to_vec(&index).unwrap_or_default()),
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ("config.json", config),
    ] {
        let path = dir.join(name);
        fs::write(&path, bytes).at("cannot write", &path)?;
    }
    Ok(())
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |four: u8| char::from_digit(u32::from(four), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}
