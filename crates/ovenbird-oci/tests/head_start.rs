//! A layer that is sent while it is packed.

mod registry_servers;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ovenbird_oci::image::media;
use ovenbird_oci::layer::{Compression, Elsewhere, Found, Needles, Owners, PackOptions, Packed, pack_searched};
use ovenbird_oci::publish::Target;
use ovenbird_oci::registry::{Client, HeadStart, HeadStarts, Publication, RegistryError};
use ovenbird_oci::{Descriptor, Reference};
use registry_servers::*;

const SIZE: u64 = 48 << 20;
const SECRET: &[u8] = b"correct-horse-battery-staple";

/// A folder with a file that does not shrink, and a secret in the middle of it if asked for.
fn folder(here: &Place, secret: bool) -> std::path::PathBuf {
    let dir = here.dir.path().join("layer");
    std::fs::create_dir(&dir).unwrap();
    let mut file = File::create(dir.join("noise")).unwrap();
    std::io::copy(&mut Noise { state: 7, left: SIZE / 4 * 3 }, &mut file).unwrap();
    if secret {
        file.write_all(SECRET).unwrap();
    }
    std::io::copy(&mut Noise { state: 8, left: SIZE / 4 }, &mut file).unwrap();
    dir
}

fn pack(here: &Place, dir: &std::path::Path, head_start: &HeadStart) -> (Packed, Vec<Found>) {
    let options = PackOptions { compression: Compression::Gzip(1), mtime: Some(0), threads: 2 };
    let growth = Some(head_start.growth());
    pack_searched(dir, &Owners::new(), &options, &here.store, &Needles::new([SECRET]), &Elsewhere::new(), growth).unwrap()
}

fn image_of(here: &Place, layer: &Packed) -> Descriptor {
    let config = serde_json::json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] } });
    let config = document(&here.store, media::OCI_CONFIG, &config);
    let layers = [layer.descriptor()];
    let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "config": config, "layers": layers });
    document(&here.store, media::OCI_MANIFEST, &manifest)
}

async fn publish(
    client: &Client,
    here: &Place,
    image: &Descriptor,
    to: &Reference,
    head_starts: &Arc<HeadStarts>,
) -> Result<(), RegistryError> {
    let to = &[Target::from(to.clone())];
    let origins = BTreeMap::new();
    let publication = Publication { image, store: &here.store, to, origins: &origins, progress: &quiet(), head_starts };
    client.publish(&publication, &Arc::default()).await
}

/// How many requests the proxy saw that begin like this.
fn seen(proxy: &Proxy, what: &str) -> usize {
    proxy.heads.lock().unwrap().lines().filter(|line| line.starts_with(what)).count()
}

async fn until(what: &str, is: impl Fn() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bytes_are_there_when_the_layer_is() {
    let Some(registry) = Registry::start() else { return };
    let proxy = Proxy::start(registry.port, "", vec![]);
    let (here, client, head_starts) = (place(), client(), Arc::new(HeadStarts::default()));
    let dir = folder(&here, false);
    let to = proxy.reference("app:1");
    let head_start = client.head_start(&to, &here.store).unwrap();
    let (packed, found) = pack(&here, &dir, &head_start);
    assert_eq!(found, []);
    until("nothing is sent before the layer is complete", || seen(&proxy, "PATCH ") == 1).await;
    head_starts.complete(head_start, &packed.digest, packed.size);
    publish(&client, &here, &image_of(&here, &packed), &to, &head_starts).await.unwrap();
    assert!(registry.has_blob("app", &packed.digest));
    assert_eq!(seen(&proxy, "PATCH "), 1, "nothing is sent twice");
    // What the registry has already is not completed a second time, and what was sent of it is given up.
    let head_start = client.head_start(&to, &here.store).unwrap();
    let (packed, _) = pack(&here, &dir, &head_start);
    until("nothing is sent before the layer is complete", || seen(&proxy, "PATCH ") == 2).await;
    head_starts.complete(head_start, &packed.digest, packed.size);
    publish(&client, &here, &image_of(&here, &packed), &to, &head_starts).await.unwrap();
    drop(head_starts);
    until("the upload is not given up", || seen(&proxy, "DELETE /v2/app/blobs/uploads/") == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_stops_it() {
    let Some(registry) = Registry::start() else { return };
    let proxy = Proxy::start(registry.port, "", vec![]);
    let (here, client) = (place(), client());
    let dir = folder(&here, true);
    let head_start = client.head_start(&proxy.reference("app:1"), &here.store).unwrap();
    let following = head_start.growth().follow();
    let (packed, found) = pack(&here, &dir, &head_start);
    assert_eq!(found.len(), 1);
    let ready = following.borrow().ready;
    // A layer that does not shrink is as long as its content.
    assert!(ready > SIZE / 2 && ready < SIZE / 4 * 3, "{ready} of {} bytes", packed.size);
    until("it never began", || seen(&proxy, "PATCH ") == 1).await;
    let head_starts = HeadStarts::default();
    head_starts.complete(head_start, &packed.digest, packed.size);
    assert!(!following.borrow().whole);
    until("the upload is not given up", || seen(&proxy, "DELETE /v2/app/blobs/uploads/") == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_start_that_breaks_costs_nothing_but_time() {
    let too_large = "HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    for fault in [Fault::CutUp(20 << 20), Fault::Refuse("PATCH ", too_large)] {
        let Some(registry) = Registry::start() else { return };
        let proxy = Proxy::start(registry.port, "", vec![fault]);
        let (here, client, head_starts) = (place(), client(), Arc::new(HeadStarts::default()));
        let dir = folder(&here, false);
        let to = proxy.reference("broken:1");
        let head_start = client.head_start(&to, &here.store).unwrap();
        let (packed, _) = pack(&here, &dir, &head_start);
        until("it never began", || seen(&proxy, "PATCH ") == 1).await;
        head_starts.complete(head_start, &packed.digest, packed.size);
        let image = image_of(&here, &packed);
        publish(&client, &here, &image, &to, &head_starts).await.unwrap();
        assert_eq!(registry.tag("broken", "1"), Some(image.digest));
        assert!(registry.has_blob("broken", &packed.digest) && proxy.is_done());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_layer_and_a_narrow_way_get_none() {
    let Some(registry) = Registry::start() else { return };
    let proxy = Proxy::start(registry.port, "", vec![]);
    let narrow = ovenbird_oci::registry::ClientOptions { parallel: 1, ..Default::default() };
    for (client, size) in [(client(), 1 << 20), (Client::new(narrow), SIZE)] {
        let (here, head_starts) = (place(), Arc::new(HeadStarts::default()));
        let dir = here.dir.path().join("layer");
        std::fs::create_dir(&dir).unwrap();
        std::io::copy(&mut Noise { state: 9, left: size }, &mut File::create(dir.join("noise")).unwrap()).unwrap();
        let to = proxy.reference("app:1");
        let head_start = client.head_start(&to, &here.store).unwrap();
        let (packed, _) = pack(&here, &dir, &head_start);
        head_starts.complete(head_start, &packed.digest, packed.size);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(seen(&proxy, "POST "), 0);
        publish(&client, &here, &image_of(&here, &packed), &to, &head_starts).await.unwrap();
        assert!(registry.has_blob("app", &packed.digest));
        proxy.heads.lock().unwrap().clear();
    }
}
