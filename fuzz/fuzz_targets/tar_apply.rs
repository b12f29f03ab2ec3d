//! Layers: whatever the bytes, nothing outside the root changes, and what was unpacked can be packed or is refused by name.
#![no_main]

use std::fs;
use std::os::unix::fs::MetadataExt;

use libfuzzer_sys::fuzz_target;
use ovenbird_oci::layer::{Compression, Ownership, PackOptions, extract, pack, unpack};
use ovenbird_oci::store::Store;

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (root, plain, outside) = (dir.path().join("root"), dir.path().join("plain"), dir.path().join("outside"));
    for folder in [&root, &plain, &outside] {
        fs::create_dir(folder).expect("a folder");
    }
    fs::write(outside.join("secret"), "secret").expect("a file");
    // The checksum of headers is made right, or the fuzzer never gets past it.
    let mut tar = data.to_vec();
    for block in tar.chunks_exact_mut(512).filter(|b| b[257..262] == *b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    let layer = unpack(&tar[..], &root, None, Ownership::Recorded, &|_| None);
    let _ = extract(&tar[..], &plain, Ownership::Recorded);
    let meta = fs::metadata(outside.join("secret")).expect("the secret");
    assert_eq!(fs::read(outside.join("secret")).expect("the secret"), b"secret");
    assert_eq!((meta.nlink(), fs::read_dir(&outside).expect("outside").count()), (1, 1));
    assert_eq!(fs::read_dir(dir.path()).expect("the folder").count(), 3);
    // Sparse files may be as large as the disk allows: packing those takes too long here.
    let small = |root: &std::path::Path| {
        let mut pending = vec![root.to_owned()];
        while let Some(path) = pending.pop() {
            let Ok(meta) = fs::symlink_metadata(&path) else { return false };
            if meta.is_dir() {
                pending.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|e| e.path()));
            } else if meta.len() > 1 << 22 {
                return false;
            }
        }
        true
    };
    if let Ok(owners) = layer
        && small(&root)
    {
        let store = Store::open(&dir.path().join("store")).expect("a store");
        let options = PackOptions { compression: Compression::None, mtime: None, threads: 1 };
        let _ = pack(&root, &owners, &options, &store);
    }
});
