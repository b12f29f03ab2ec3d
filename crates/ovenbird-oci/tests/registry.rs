//! Pull and push against a real registry.

mod registry_servers;

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Arc, Mutex};

use ovenbird_oci::image::media;
use ovenbird_oci::keychain::Secret;
use ovenbird_oci::registry::{ClientOptions, ProgressFn, RegistryError, RegistryOptions};
use ovenbird_oci::store::{Store, StoreError};
use ovenbird_oci::{Descriptor, Digest, Reference};
use registry_servers::*;

#[tokio::test(flavor = "multi_thread")]
async fn round_trip_of_an_image() {
    let Some(registry) = Registry::start() else { return };
    let (here, there) = (place(), place());
    let (manifest, blobs) = image(&here.store, 1, "amd64", &[3_000_000, 0, 100, 70_000]);
    let to = registry.reference("some/deep/image:v1");
    let client = client();
    let seen: Arc<Mutex<BTreeMap<Digest, (u64, u64)>>> = Arc::default();
    let kept = Arc::clone(&seen);
    let progress: ProgressFn = Arc::new(move |digest, done, total| {
        let mut kept = kept.lock().unwrap();
        let last = kept.entry(*digest).or_default();
        assert!(done <= total && done >= last.0, "{digest} goes back: {done} after {}", last.0);
        *last = (done, total);
    });

    assert_eq!(client.head(&to).await.unwrap(), None);
    client.push(&here.store, &manifest, &to, &BTreeMap::new(), &progress).await.unwrap();
    for blob in &blobs {
        assert_eq!(seen.lock().unwrap()[&blob.digest], (blob.size, blob.size));
        assert!(registry.has_blob("some/deep/image", &blob.digest));
    }
    let head = client.head(&to).await.unwrap().unwrap();
    assert_eq!((head.digest, head.size, head.media_type.as_str()), (manifest.digest, manifest.size, media::OCI_MANIFEST));
    if have("skopeo") {
        let out =
            Command::new("skopeo").args(["inspect", "--tls-verify=false", "--format={{.Digest}}", &format!("docker://{to}")]).output();
        assert_eq!(String::from_utf8(out.unwrap().stdout).unwrap().trim(), manifest.digest.to_string());
    }

    seen.lock().unwrap().clear();
    let platform = "linux/amd64".parse().unwrap();
    let pulled = client.pull(&to, Some(&platform), &there.store, &progress).await.unwrap();
    assert_eq!(pulled.digest, manifest.digest);
    for blob in &blobs {
        assert_eq!(seen.lock().unwrap()[&blob.digest], (blob.size, blob.size));
        there.store.verify(&blob.digest).unwrap();
    }
    assert_eq!(client.manifest(&to).await.unwrap().bytes, here.store.read(&manifest.digest).unwrap());
    // Nothing left to do, by digest not even a manifest to fetch.
    drop(registry);
    client.pull(&to.with_digest(manifest.digest), Some(&platform), &there.store, &quiet()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_blobs_are_fetched_again() {
    let Some(registry) = Registry::start() else { return };
    let (here, there) = (place(), place());
    let (manifest, blobs) = image(&here.store, 1, "amd64", &[300_000]);
    let to = registry.reference("app:1");
    client().push(&here.store, &manifest, &to, &BTreeMap::new(), &quiet()).await.unwrap();
    let break_it = |store: &Store, blob: &Descriptor, size: u64| {
        let path = store.blob_path(&blob.digest);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, vec![b'x'; usize::try_from(size).unwrap()]).unwrap();
    };
    client().pull(&to, None, &there.store, &quiet()).await.unwrap();
    for blob in blobs.iter().chain([&manifest]) {
        for size in [0, 100, blob.size] {
            break_it(&there.store, blob, size);
            client().pull(&to, None, &there.store, &quiet()).await.unwrap();
            there.store.verify(&blob.digest).unwrap();
        }
    }
    // A push of what is broken here does not blame the registry, and what cannot be used is removed.
    let other = registry.reference("other:1");
    let push = async || client().push(&there.store, &manifest, &other, &BTreeMap::new(), &quiet()).await.unwrap_err();
    let broken = |error: RegistryError| match error {
        RegistryError::Store { source, .. } => *source,
        other => panic!("{other}"),
    };
    break_it(&there.store, &blobs[0], 100);
    assert!(matches!(broken(push().await), StoreError::Damaged { digest, actual: 100, .. } if digest == blobs[0].digest));
    break_it(&there.store, &blobs[0], blobs[0].size);
    assert!(matches!(broken(push().await), StoreError::Corrupt { expected, .. } if expected == blobs[0].digest));
    assert!(!there.store.has(&blobs[0].digest));
    // With an origin it is fetched from there.
    let origins = BTreeMap::from([(manifest.digest, to.clone()), (blobs[0].digest, to.clone())]);
    break_it(&there.store, &manifest, 0);
    client().push(&there.store, &manifest, &other, &origins, &quiet()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_and_platforms() {
    let Some(registry) = Registry::start() else { return };
    let here = place();
    let (amd, amd_blobs) = image(&here.store, 1, "amd64", &[1000]);
    let (arm, arm_blobs) = image(&here.store, 2, "arm64", &[1001]);
    let (v6, _) = image(&here.store, 3, "arm", &[1002]);
    let v6 = Descriptor { platform: Some("linux/arm/v6".parse().unwrap()), ..v6 };
    // amd64 stands in the outer index, and again in an inner one.
    let inner = index(&here.store, &[arm.clone(), v6.clone(), amd.clone()]);
    let outer = index(&here.store, &[amd.clone(), inner]);
    let to = registry.reference("multi:latest");
    client().push(&here.store, &outer, &to, &BTreeMap::new(), &quiet()).await.unwrap();

    let all = place();
    assert_eq!(client().pull(&to, None, &all.store, &quiet()).await.unwrap().digest, outer.digest);
    assert_eq!(all.store.blobs().unwrap().len(), here.store.blobs().unwrap().len());
    let rows = [("linux/amd64", Some(&amd)), ("linux/arm64", Some(&arm)), ("linux/arm/v7", Some(&v6)), ("linux/s390x", None)];
    for (platform, expected) in rows {
        let one = place();
        let result = client().pull(&to, Some(&platform.parse().unwrap()), &one.store, &quiet()).await;
        match (result, expected) {
            (Ok(got), Some(expected)) => assert_eq!(got.digest, expected.digest, "{platform}"),
            (Err(error @ RegistryError::NoPlatform { .. }), None) => {
                let text = error.to_string();
                assert!(text.contains("has no image for linux/s390x") && text.contains("linux/arm64"), "{text}");
            }
            (result, _) => panic!("{platform}: {result:?}"),
        }
        assert_eq!(one.store.has(&amd_blobs[0].digest), platform == "linux/amd64");
        assert_eq!(one.store.has(&arm_blobs[0].digest), platform == "linux/arm64");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_and_origins() {
    let Some(registry) = Registry::start() else { return };
    let Some(other) = Registry::start() else { return };
    let here = place();
    let (manifest, blobs) = image(&here.store, 5, "amd64", &[200_000, 300_000]);
    let base = registry.reference("base:1");
    client().push(&here.store, &manifest, &base, &BTreeMap::new(), &quiet()).await.unwrap();
    let origins: BTreeMap<_, _> = blobs.iter().map(|b| (b.digest, base.clone())).collect();

    // Same registry: mounted, though the store has no layer at all; nothing is sent.
    for blob in &blobs {
        here.store.remove(&blob.digest).unwrap();
    }
    let watched = Proxy::start(registry.port, "", vec![]);
    let origins_by_proxy: BTreeMap<_, _> = blobs.iter().map(|b| (b.digest, watched.reference("base:1"))).collect();
    client().push(&here.store, &manifest, &watched.reference("app:1"), &origins_by_proxy, &quiet()).await.unwrap();
    let heads = watched.heads.lock().unwrap().clone();
    assert_eq!(heads.matches("?mount=sha256").count(), 3, "{heads}");
    assert!(!heads.contains("PUT /v2/app/blobs") && !heads.contains("/blobs/uploads/ ") && !heads.contains("GET /v2/base"), "{heads}");
    assert!(registry.has_blob("app", &blobs[0].digest));
    assert!(!here.store.has(&blobs[0].digest));

    // Another registry: fetched from the origin, then sent.
    client().push(&here.store, &manifest, &other.reference("app:1"), &origins, &quiet()).await.unwrap();
    assert!(other.has_blob("app", &blobs[1].digest));
    // A mount that the registry cannot do (nothing there) becomes an upload.
    let wrong: BTreeMap<_, _> = blobs.iter().map(|b| (b.digest, other.reference("nowhere:1"))).collect();
    client().push(&here.store, &manifest, &other.reference("app2:1"), &wrong, &quiet()).await.unwrap();

    // In no store and of no origin.
    let empty = place();
    empty.store.write(&here.store.read(&manifest.digest).unwrap()).unwrap();
    let error = client().push(&empty.store, &manifest, &other.reference("app3:1"), &BTreeMap::new(), &quiet()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Store { .. }), "{error}");
    // The manifest too is fetched when its origin is known, and its blobs then come from there.
    let nothing = place();
    let only_root = BTreeMap::from([(manifest.digest, base)]);
    client().push(&nothing.store, &manifest, &other.reference("app4:1"), &only_root, &quiet()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_pushes_send_a_blob_once() {
    let Some(registry) = Registry::start() else { return };
    let proxy = Proxy::start(registry.port, "", vec![]);
    let here = place();
    let (one, _) = image(&here.store, 9, "amd64", &[2_000_000]);
    let client = client();
    let push = |tag: &str| {
        let (client, store, one, to) = (client.clone(), here.store.clone(), one.clone(), proxy.reference(&format!("same:{tag}")));
        tokio::spawn(async move { client.push(&store, &one, &to, &BTreeMap::new(), &quiet()).await })
    };
    let tasks = [push("a"), push("b"), push("c")];
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let heads = proxy.heads.lock().unwrap().clone();
    assert_eq!(heads.matches("PUT /v2/same/blobs/uploads/").count(), 2, "one layer, one config: {heads}");
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_layers_are_left_out() {
    let Some(registry) = Registry::start() else { return };
    let here = place();
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let layers = [blob(&here.store, 1, 10, media::DOCKER_LAYER_GZIP), blob(&here.store, 2, 10, foreign)];
    let config = document(&here.store, media::DOCKER_CONFIG, &serde_json::json!({ "os": "windows" }));
    let mut value = serde_json::json!({ "schemaVersion": 2, "mediaType": media::DOCKER_MANIFEST, "config": config, "layers": layers });
    value["layers"][1]["urls"] = serde_json::json!(["https://example.invalid/layer"]);
    let manifest = document(&here.store, media::DOCKER_MANIFEST, &value);
    here.store.remove(&layers[1].digest).unwrap();
    let to = registry.reference("windows:1");
    let pushed = client().push(&here.store, &manifest, &to, &BTreeMap::new(), &quiet()).await;
    // This registry refuses foreign layers by policy unless told otherwise: then the refusal is about the manifest alone.
    if let Err(error) = pushed {
        assert!(error.to_string().contains("manifest"), "{error}");
    }
    assert!(registry.has_blob("windows", &layers[0].digest) && !registry.has_blob("windows", &layers[1].digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords() {
    let Some(registry) = Registry::start_with_password() else { return };
    let here = place();
    let (manifest, blobs) = image(&here.store, 1, "amd64", &[5000]);
    let to = registry.reference("private:1");
    let good = client_with(here.dir.path(), &serde_json::json!({ registry.host(): basic("anna", "pass:word") }));
    good.push(&here.store, &manifest, &to, &BTreeMap::new(), &quiet()).await.unwrap();
    let there = place();
    good.pull(&to, None, &there.store, &quiet()).await.unwrap();
    assert!(there.store.has(&blobs[0].digest));

    let wrong = client_with(there.dir.path(), &serde_json::json!({ registry.host(): basic("anna", "hunter2") }));
    for client in [wrong, client()] {
        let error = client.manifest(&to).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, RegistryError::Unauthorized { .. }) && text.contains("ovenbird login 127.0.0.1:"), "{text}");
        assert!(!format!("{error:?} {text} {client:?}").contains("hunter2"));
    }
    let host = registry.host();
    client().check_login(&host, "anna", &Secret::new("pass:word")).await.unwrap();
    let error = client().check_login(&host, "anna", &Secret::new("no")).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens() {
    let Some((registry, server)) = with_tokens() else { return };
    let here = place();
    let (manifest, blobs) = image(&here.store, 1, "amd64", &[5000, 6000, 7000]);
    let to = registry.reference("public/app:1");
    let anna = client_with(here.dir.path(), &serde_json::json!({ registry.host(): basic("anna", "pass:word") }));
    anna.push(&here.store, &manifest, &to, &BTreeMap::new(), &quiet()).await.unwrap();
    // Parallel transfers share one token for each set of scopes.
    let requests = server.requests();
    assert!(requests.len() <= 2 && requests.iter().all(|r| r.starts_with("GET anna repository:public/app:pull")), "{requests:?}");

    // Nobody may pull what is public, not what is private, and not push.
    let there = place();
    client().pull(&to, None, &there.store, &quiet()).await.unwrap();
    let error = client().push(&here.store, &manifest, &to.with_tag("2"), &BTreeMap::new(), &quiet()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }), "{error}");
    let private = registry.reference("private/app:1");
    let origins: BTreeMap<_, _> = blobs.iter().map(|b| (b.digest, to.clone())).collect();
    anna.push(&here.store, &manifest, &private, &origins, &quiet()).await.unwrap();
    assert!(server.requests().iter().any(|r| r.contains("repository:private/app:pull,push") && r.contains("repository:public/app:pull")));
    let error = client().manifest(&private).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }) && error.to_string().contains("nobody is logged in"), "{error}");

    // An identity token is exchanged by POST, and never sent to the registry.
    let identity = client_with(there.dir.path(), &serde_json::json!({ registry.host(): { "identitytoken": "refresh-me" } }));
    identity.manifest(&private).await.unwrap();
    assert!(server.requests().last().unwrap().starts_with("POST identity repository:private/app:pull"));
    let wrong = client_with(there.dir.path(), &serde_json::json!({ registry.host(): basic("anna", "hunter2") }));
    let error = wrong.manifest(&private).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }) && error.to_string().contains("incorrect username"), "{error}");
    let bert = client_with(there.dir.path(), &serde_json::json!({ registry.host(): basic("bert", "x") }));
    bert.manifest(&to).await.unwrap();
    let error = bert.manifest(&private).await.unwrap_err();
    assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
    anna.check_login(&registry.host(), "anna", &Secret::new("pass:word")).await.unwrap();
    assert!(anna.check_login(&registry.host(), "anna", &Secret::new("x")).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_is_renewed() {
    let Some((registry, server)) = with_tokens() else { return };
    let here = place();
    let (manifest, _) = image(&here.store, 1, "amd64", &[5000]);
    let to = registry.reference("public/app:1");
    let anna = client_with(here.dir.path(), &serde_json::json!({ registry.host(): basic("anna", "pass:word") }));
    anna.push(&here.store, &manifest, &to, &BTreeMap::new(), &quiet()).await.unwrap();
    server.life.store(2, std::sync::atomic::Ordering::SeqCst);
    let nobody = client();
    nobody.manifest(&to).await.unwrap();
    let before = server.requests().len();
    nobody.manifest(&to).await.unwrap();
    assert_eq!(server.requests().len(), before, "still good");
    tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    nobody.manifest(&to).await.unwrap();
    assert_eq!(server.requests().len(), before + 1, "renewed once");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls() {
    if !have("openssl") {
        return;
    }
    let Some(plain) = Registry::start() else { return };
    let tls = "  tls:\n    certificate: DIR/cert.pem\n    key: DIR/key.pem";
    let Some(registry) = Registry::start_with("", tls, certificate) else { return };
    let here = place();
    certificate(here.dir.path());
    let (manifest, _) = image(&here.store, 1, "amd64", &[5_000_000, 10]);
    let with_ca = |registry: &Registry, dir: &std::path::Path| {
        client_for(&registry.host(), RegistryOptions { ca: Some(dir.join("cert.pem")), ..RegistryOptions::default() })
    };
    let to = registry.reference("app:1");
    let good = with_ca(&registry, registry.dir.path());
    good.push(&here.store, &manifest, &to, &BTreeMap::new(), &quiet()).await.unwrap();
    let there = place();
    good.pull(&to, None, &there.store, &quiet()).await.unwrap();

    // Another authority; a server without TLS; TLS where plain HTTP was expected; settings that cannot work.
    let error = with_ca(&registry, here.dir.path()).manifest(&to).await.unwrap_err();
    assert!(matches!(error, RegistryError::Tls { .. }), "{error:?}");
    let error = with_ca(&plain, here.dir.path()).manifest(&plain.reference("app:1")).await.unwrap_err();
    assert!(matches!(error, RegistryError::PlainHttp { .. }) && error.to_string().contains("plain_http = true"), "{error:?}");
    let error = client().manifest(&to).await.unwrap_err();
    assert!(error.to_string().contains("HTTPS server"), "{error}");
    for ca in ["absent.pem", "key.pem"] {
        let options = RegistryOptions { ca: Some(here.dir.path().join(ca)), ..RegistryOptions::default() };
        let error = client_for(&registry.host(), options).manifest(&to).await.unwrap_err();
        assert!(matches!(error, RegistryError::Settings { .. }) && error.to_string().contains(ca), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_first_then_the_registry() {
    let (Some(mirror), Some(registry)) = (Registry::start(), Registry::start()) else { return };
    let here = place();
    let (old, old_blobs) = image(&here.store, 1, "amd64", &[1000]);
    let (new, new_blobs) = image(&here.store, 2, "amd64", &[1001]);
    client().push(&here.store, &old, &mirror.reference("cache/app:1"), &BTreeMap::new(), &quiet()).await.unwrap();
    client().push(&here.store, &new, &registry.reference("app:1"), &BTreeMap::new(), &quiet()).await.unwrap();
    client().push(&here.store, &new, &registry.reference("app:only-here"), &BTreeMap::new(), &quiet()).await.unwrap();
    let mirrors = vec!["127.0.0.1:9".into(), format!("{}/cache", mirror.host())];
    let client = client_for(&registry.host(), RegistryOptions { mirrors, ..RegistryOptions::default() });
    let there = place();
    let rows: [(&str, &Descriptor, &Descriptor); 2] = [("app:1", &old, &old_blobs[0]), ("app:only-here", &new, &new_blobs[0])];
    for (name, expected, layer) in rows {
        assert_eq!(client.pull(&registry.reference(name), None, &there.store, &quiet()).await.unwrap().digest, expected.digest);
        assert!(there.store.has(&layer.digest));
    }
    // Pushing never goes to a mirror.
    client.push(&here.store, &new, &registry.reference("app:2"), &BTreeMap::new(), &quiet()).await.unwrap();
    assert!(!mirror.has_blob("cache/app", &new_blobs[0].digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there() {
    let client = client();
    let nowhere: Reference = "127.0.0.1:9/app:1".parse().unwrap();
    let error = client.manifest(&nowhere).await.unwrap_err();
    assert!(matches!(error, RegistryError::Connect { .. }) && error.to_string().contains("no connection to 127.0.0.1:9"), "{error}");
    let Some(registry) = Registry::start() else { return };
    let here = place();
    let absent = registry.reference("absent:1");
    let error = client.pull(&absent, None, &here.store, &quiet()).await.unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }) && error.to_string().contains("absent:1"), "{error}");
    let (_, blobs) = image(&place().store, 1, "amd64", &[10]);
    let error = client.fetch_blob(&absent, &blobs[0], &here.store, &quiet()).await.unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
    let options = ClientOptions { parallel: 1, ..ClientOptions::default() };
    assert!(format!("{:?}", ovenbird_oci::registry::Client::new(options)).contains("parallel: 1"));
}
