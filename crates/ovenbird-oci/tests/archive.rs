//! Archives: what is written is read again, by us and by other tools.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use ovenbird_oci::archive::{ArchiveError, Images, read, read_dir, write_docker, write_oci, write_oci_dir};
use ovenbird_oci::image::{RootFs, media};
use ovenbird_oci::layer::tar::{Header, Kind, Reader, encode, padding};
use ovenbird_oci::layer::{Compression, Owners, PackOptions, pack};
use ovenbird_oci::store::{Store, StoreError};
use ovenbird_oci::{Descriptor, Digest, ImageConfig, Index, Manifest, Platform, Reference};
use serde_json::json;

fn blob(media_type: &str, digest: Digest, size: usize) -> Descriptor {
    Descriptor { media_type: media_type.into(), digest, size: size as u64, platform: None, annotations: BTreeMap::new() }
}

fn put(store: &Store, media_type: &str, value: &impl serde::Serialize) -> Descriptor {
    let bytes = serde_json::to_vec(value).unwrap();
    blob(media_type, store.write(&bytes).unwrap(), bytes.len())
}

/// An image with one layer for each compression.
fn image(store: &Store, mark: &str, compressions: &[Compression]) -> Descriptor {
    let mut config = ImageConfig { architecture: "amd64".into(), os: "linux".into(), rootfs: RootFs::default(), ..ImageConfig::default() };
    let mut layers = vec![];
    for (i, &compression) in compressions.iter().enumerate() {
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir(tree.path().join("etc")).unwrap();
        fs::write(tree.path().join("etc/name"), format!("{mark} {i}")).unwrap();
        let packed = pack(tree.path(), &Owners::new(), &PackOptions { compression, mtime: Some(0), threads: 1 }, store).unwrap();
        config.rootfs.diff_ids.push(packed.diff_id);
        layers.push(blob(&packed.media_type, packed.digest, packed.size as usize));
    }
    let config = put(store, media::OCI_CONFIG, &config);
    let media_type = Some(media::OCI_MANIFEST.into());
    put(store, media::OCI_MANIFEST, &Manifest { schema_version: 2, media_type, config, layers, annotations: BTreeMap::new() })
}

fn index(store: &Store, platforms: &[(&str, Descriptor)]) -> Descriptor {
    let manifests = platforms.iter().map(|(p, d)| Descriptor { platform: Some(p.parse::<Platform>().unwrap()), ..d.clone() }).collect();
    let media_type = Some(media::OCI_INDEX.into());
    put(store, media::OCI_INDEX, &Index { schema_version: 2, media_type, manifests, annotations: BTreeMap::new() })
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

fn names(list: &[&str]) -> Vec<Reference> {
    list.iter().map(|n| n.parse().unwrap()).collect()
}

const GZIP: Compression = Compression::Gzip(5);

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = vec![];
    for (path, content) in files {
        let link = content.strip_prefix(b"-> ");
        let mut header = Header::new(*path, if link.is_some() { Kind::Symlink } else { Kind::File });
        header.link = link.unwrap_or_default().to_vec();
        let content = if link.is_some() { &[][..] } else { content };
        header.size = content.len() as u64;
        encode(&header, &mut out);
        out.extend_from_slice(content);
        out.resize(out.len() + padding(header.size), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn untar(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut reader = Reader::new(bytes);
    let mut files = vec![];
    while let Some(header) = reader.next().unwrap() {
        let mut content = vec![];
        reader.read_to_end(&mut content).unwrap();
        files.push((String::from_utf8(header.path).unwrap(), content));
    }
    files
}

fn load(bytes: &[u8]) -> Result<(Images, Store, tempfile::TempDir), ArchiveError> {
    let (dir, store) = store();
    let images = read(&store, &mut &bytes[..])?;
    Ok((images, store, dir))
}

#[test]
fn oci_round_trip() {
    let (_dir, store) = store();
    let one = image(&store, "one", &[GZIP, Compression::None, Compression::Zstd(3)]);
    let two = image(&store, "two", &[GZIP]);
    let both = index(&store, &[("linux/amd64", one.clone()), ("linux/arm64", two.clone())]);
    for (target, name_list) in [(&one, names(&["a:1", "h.io/b:2"])), (&both, names(&["c"])), (&two, vec![])] {
        let mut bytes = vec![];
        write_oci(&store, target, &name_list, &mut bytes).unwrap();
        let mut again = vec![];
        write_oci(&store, target, &name_list, &mut again).unwrap();
        assert!(bytes == again, "deterministic");
        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        encoder.write_all(&bytes).unwrap();
        for archive in [bytes, encoder.finish().unwrap()] {
            let (images, other, _other_dir) = load(&archive).unwrap();
            assert_eq!(images, [(target.clone(), name_list.clone())]);
            for (digest, _) in other.blobs().unwrap() {
                other.verify(&digest).unwrap();
            }
            let mut third = vec![];
            write_oci(&other, target, &name_list, &mut third).unwrap();
            assert!(again == third, "everything came over");
        }
    }
    // A platform that was never pulled is left out; a layer is not.
    store.remove(&two.digest).unwrap();
    let mut bytes = vec![];
    write_oci(&store, &both, &[], &mut bytes).unwrap();
    assert_eq!(load(&bytes).unwrap().0, [(both.clone(), vec![])]);
    let manifest: Manifest = serde_json::from_slice(&store.read(&one.digest).unwrap()).unwrap();
    store.remove(&manifest.layers[0].digest).unwrap();
    let error = write_oci(&store, &both, &[], &mut vec![]).unwrap_err();
    assert!(matches!(error, ArchiveError::Store(StoreError::Missing { digest }) if digest == manifest.layers[0].digest), "{error}");
    fs::write(store.blob_path(&manifest.layers[0].digest), vec![0; manifest.layers[0].size as usize]).unwrap();
    assert!(write_oci(&store, &one, &[], &mut vec![]).unwrap_err().to_string().contains("is corrupt"));
    let path = store.blob_path(&manifest.layers[0].digest);
    fs::write(&path, "cut").unwrap();
    let error = write_oci(&store, &one, &[], &mut vec![]).unwrap_err();
    assert!(matches!(error, ArchiveError::Store(StoreError::Damaged { actual: 3, .. })), "neither archive nor output is wrong: {error}");
    assert!(error.to_string().contains(&*path.to_string_lossy()) && error.to_string().contains("ovenbird pull"), "{error}");
}

/// A layout that is read again puts right what was damaged in the store.
#[test]
fn oci_folder_repairs_the_store() {
    let (_dir, store) = store();
    let folder = tempfile::tempdir().unwrap();
    let one = image(&store, "one", &[GZIP]);
    write_oci_dir(&store, &one, &[], folder.path()).unwrap();
    let manifest: Manifest = serde_json::from_slice(&store.read(&one.digest).unwrap()).unwrap();
    for (blob, bytes) in [(&one, 0), (&manifest.config, 7), (&manifest.config, manifest.config.size), (&manifest.layers[0], 9)] {
        let path = store.blob_path(&blob.digest);
        fs::remove_file(&path).unwrap();
        fs::write(&path, vec![b' '; bytes as usize]).unwrap();
        read_dir(&store, folder.path()).unwrap();
        store.verify(&blob.digest).unwrap();
    }
}

#[test]
fn oci_folder_keeps_its_images() {
    let (_dir, store) = store();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("layout");
    let (one, two) = (image(&store, "one", &[GZIP]), image(&store, "two", &[GZIP]));
    write_oci_dir(&store, &one, &names(&["a:1", "b:1"]), &dir).unwrap();
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("index.json")).unwrap()).unwrap();
    value["annotations"] = json!({"kept": "yes"});
    fs::write(dir.join("index.json"), value.to_string()).unwrap();
    write_oci_dir(&store, &two, &names(&["b:1"]), &dir).unwrap();
    write_oci_dir(&store, &two, &[], &dir).unwrap();
    write_oci_dir(&store, &two, &[], &dir).unwrap();
    let (_other_dir, other) = self::store();
    assert_eq!(read_dir(&other, &dir).unwrap(), [(one.clone(), names(&["a:1"])), (two.clone(), names(&["b:1"]))]);
    assert_eq!(other.read(&two.digest).unwrap(), store.read(&two.digest).unwrap());
    let index = fs::read_to_string(dir.join("index.json")).unwrap();
    assert!(index.contains(r#""kept":"yes""#) && index.matches(&two.digest.to_string()).count() == 2, "{index}");

    // Hostile folders: wrong bytes, endless bytes, nothing.
    let blob = dir.join("blobs/sha256").join(one.digest.hex());
    let check = |expected: &str| {
        let (_dir, empty) = self::store();
        let error = read_dir(&empty, &dir).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    fs::remove_file(&blob).unwrap();
    check("is missing");
    fs::write(&blob, "other").unwrap();
    check("hashes to");
    fs::remove_file(&blob).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &blob).unwrap();
    check("hashes to");
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
    check("layout version");
    fs::remove_file(dir.join("index.json")).unwrap();
    check("no index.json");
}

#[test]
fn docker_archives() {
    let (_dir, store) = store();
    let one = image(&store, "one", &[GZIP, Compression::None]);
    let both = index(&store, &[("linux/amd64", one.clone()), ("unknown/unknown", image(&store, "attestation", &[]))]);
    let list = names(&["a:1", "h.io/b:2"]);
    let mut bytes = vec![];
    write_docker(&store, &both, &list, &mut bytes).unwrap();
    assert_eq!(load(&bytes).unwrap().0, [(one.clone(), list.clone())], "it is an OCI layout as well");
    // As older tools wrote it, without the layout.
    let mut files = untar(&bytes);
    files.retain(|(name, _)| name != "index.json" && name != "oci-layout" && !name.ends_with('/'));
    let plain = tar(&files.iter().map(|(n, c)| (n.as_str(), c.as_slice())).collect::<Vec<_>>());
    let (images, other, _other_dir) = load(&plain).unwrap();
    assert_eq!((images.len(), &images[0].1), (1, &list));
    let target = &images[0].0;
    let manifest: Manifest = serde_json::from_slice(&other.read(&target.digest).unwrap()).unwrap();
    let types: Vec<_> = manifest.layers.iter().map(|l| l.media_type.as_str()).collect();
    assert_eq!(types, [media::DOCKER_LAYER_GZIP, media::DOCKER_LAYER]);
    assert_eq!(target.media_type, media::DOCKER_MANIFEST);
    let original: Manifest = serde_json::from_slice(&store.read(&one.digest).unwrap()).unwrap();
    assert_eq!(manifest.config.digest, original.config.digest);
    let tags = files.iter().find(|(n, _)| n == "manifest.json").map(|(_, c)| String::from_utf8_lossy(c).into_owned()).unwrap();
    assert!(tags.contains(r#""RepoTags":["a:1","h.io/b:2"]"#), "{tags}");

    let two = index(&store, &[("linux/amd64", one), ("linux/arm64", image(&store, "arm", &[GZIP]))]);
    assert!(matches!(write_docker(&store, &two, &[], &mut vec![]), Err(ArchiveError::Platforms { count: 2 })));
}

#[test]
fn docker_archives_of_long_ago() {
    let layer = tar(&[("f", b"x")]);
    let config =
        json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer), Digest::of(&layer)]}})
            .to_string();
    let manifest = |layers: serde_json::Value| json!([{"Config": "c.json", "RepoTags": null, "Layers": layers}]).to_string();
    let good = manifest(json!(["1/layer.tar", "2/layer.tar"]));
    let archive = |manifest: &str, config: &str| {
        tar(&[
            ("1/VERSION", b"1.0"),
            ("1/json", b"{}"),
            ("1/layer.tar", &layer),
            ("2/layer.tar", b"-> ../1/layer.tar"),
            ("3/layer.tar", b"-> ../3/layer.tar"),
            ("c.json", config.as_bytes()),
            ("repositories", b"{}"),
            ("manifest.json", manifest.as_bytes()),
        ])
    };
    let (images, store, _dir) = load(&archive(&good, &config)).unwrap();
    let read: Manifest = serde_json::from_slice(&store.read(&images[0].0.digest).unwrap()).unwrap();
    assert_eq!(
        read.layers,
        [blob(media::DOCKER_LAYER, Digest::of(&layer), layer.len()), blob(media::DOCKER_LAYER, Digest::of(&layer), layer.len())]
    );
    for (manifest, config, expected) in [
        (manifest(json!(["1/layer.tar"])), config.clone(), "1 layers and 2 diff ids"),
        (manifest(json!(["1/layer.tar", "9/layer.tar"])), config.clone(), "which is not there"),
        (manifest(json!(["1/layer.tar", "3/layer.tar"])), config.clone(), "which is not there"),
        (manifest(json!(["1/layer.tar", "../../etc/passwd"])), config.clone(), "leads out of it"),
        (good.clone(), config.replace(&Digest::of(&layer).hex(), &Digest::of(b"").hex()), "hashes to"),
        (good.clone(), "[".into(), "a config cannot be understood"),
        ("{}".into(), config.clone(), "manifest.json cannot be understood"),
    ] {
        let error = load(&archive(&manifest, &config)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn hostile_archives() {
    let wrong = format!("blobs/sha256/{}", Digest::of(b"x").hex());
    let missing =
        json!({"schemaVersion": 2, "manifests": [{"mediaType": media::OCI_MANIFEST, "digest": Digest::of(b""), "size": 0}]}).to_string();
    let size = json!({"schemaVersion": 2, "manifests": [{"mediaType": "x", "digest": Digest::of(b"x"), "size": 9}]}).to_string();
    let mut long = tar(&[("index.json", b"")]);
    long.truncate(512);
    let mut header = Header::new("index.json", Kind::File);
    header.size = 1 << 40;
    let mut huge = vec![];
    encode(&header, &mut huge);
    huge.resize(20 << 20, b' ');
    for (bytes, expected) in [
        (vec![], "neither index.json"),
        (vec![1; 1000], "checksum"),
        (vec![1; 100], "cut short"),
        (tar(&[(wrong.as_str(), b"y")]), "hashes to"),
        (tar(&[("../x", b"y")]), "leads out of it"),
        (tar(&[("a/b", b"-> ../../x")]), "leads out of it"),
        (tar(&[("index.json", b"{\"schemaVersion\":2}")]), "names no image"),
        (tar(&[("index.json", missing.as_bytes())]), "is missing"),
        (tar(&[("index.json", size.as_bytes()), (wrong.as_str(), b"x")]), "has 1 bytes, not 9"),
        (tar(&[("index.json", b"{\"manifests\":[{}]}")]), "cannot be understood"),
        (huge, "larger than 16 MiB"),
    ] {
        let error = load(&bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

/// Runs a tool; `None` (with the reason printed) when it is not here.
fn run(tool: &str, arguments: &[&str], dir: &Path) -> Option<String> {
    match Command::new(tool).args(arguments).current_dir(dir).output() {
        Err(e) => {
            eprintln!("skipped: {tool} cannot be run ({e})");
            None
        }
        Ok(output) => {
            assert!(output.status.success(), "{tool} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
            Some(String::from_utf8_lossy(&output.stdout).into_owned())
        }
    }
}

#[test]
fn other_tools_agree() {
    let (_dir, store) = store();
    let one = image(&store, "one", &[GZIP, Compression::None]);
    let work = tempfile::tempdir().unwrap();
    let dir = work.path();
    write_oci(&store, &one, &names(&["a:1"]), &mut fs::File::create(dir.join("oci.tar")).unwrap()).unwrap();
    write_docker(&store, &one, &names(&["a:1"]), &mut fs::File::create(dir.join("docker.tar")).unwrap()).unwrap();
    write_oci_dir(&store, &one, &names(&["a:1"]), &dir.join("layout")).unwrap();
    let policy = ["--insecure-policy", "copy", "-q"];
    let inspect = |source: &str| run("skopeo", &["inspect", source], dir);
    if let Some(text) = inspect("oci-archive:oci.tar:1") {
        assert!(text.contains(&one.digest.to_string()), "{text}");
        assert!(inspect("oci:layout:1").unwrap().contains(&one.digest.to_string()));
        // Through skopeo and back: the layers are the same.
        for (from, to) in [("oci-archive:oci.tar:1", "docker-archive:d.tar:a:2"), ("docker-archive:docker.tar:a:1", "oci-archive:o.tar:3")]
        {
            run("skopeo", &[&policy[..], &[from, to]].concat(), dir).unwrap();
            let file = to.split(':').nth(1).unwrap();
            let (images, other, _other_dir) = load(&fs::read(dir.join(file)).unwrap()).unwrap();
            let diff_ids = |store: &Store, target: &Descriptor| {
                let manifest: Manifest = serde_json::from_slice(&store.read(&target.digest).unwrap()).unwrap();
                serde_json::from_slice::<ImageConfig>(&store.read(&manifest.config.digest).unwrap()).unwrap().rootfs.diff_ids
            };
            assert_eq!(diff_ids(&other, &images[0].0), diff_ids(&store, &one), "{from} {to}");
            assert_eq!(images[0].1, if file == "d.tar" { names(&["a:2"]) } else { vec![] });
        }
    }
    if run("umoci", &["unpack", "--rootless", "--image", "layout:1", "bundle"], dir).is_some() {
        assert_eq!(fs::read_to_string(dir.join("bundle/rootfs/etc/name")).unwrap(), "one 1");
    }
}
