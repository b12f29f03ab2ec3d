//! Big layers are never in memory: alone in its file, because memory is counted for the process.

mod registry_servers;

use std::collections::BTreeMap;

use registry_servers::*;

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_megabytes_each_way() {
    let Some(registry) = Registry::start() else { return };
    let (here, there) = (place(), place());
    let (manifest, blobs) = image(&here.store, 3, "amd64", &[100 << 20, 100 << 20]);
    let to = registry.reference("big:1");
    let client = client();
    let before = peak_kib();
    client.push(&here.store, &manifest, &to, &BTreeMap::new(), &quiet()).await.unwrap();
    client.pull(&to, None, &there.store, &quiet()).await.unwrap();
    let grown = peak_kib() - before;
    assert!(grown < 64 << 10, "memory grew by {grown} KiB");
    for blob in &blobs {
        there.store.verify(&blob.digest).unwrap();
    }
}
