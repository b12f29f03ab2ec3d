//! Connections that break, servers that are busy, and servers that lie.

mod registry_servers;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;

use ovenbird_oci::image::media;
use ovenbird_oci::registry::{Client, ClientOptions, MAX_MANIFEST, RegistryError, Timeouts};
use ovenbird_oci::{Descriptor, Digest, Reference};
use registry_servers::*;

const BUSY: &str = "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
const DOWN: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
const FORBIDDEN: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 80\r\nConnection: close\r\n\r\n\
    {\"errors\":[{\"code\":\"DENIED\",\"message\":\"not yours \\u001b[31m, anna\"}]}               ";
const LATER: &str = "HTTP/1.1 503 Later\r\nRetry-After: 2\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
const NEVER: &str = "HTTP/1.1 503 Later\r\nRetry-After: 99999\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
const TOO_BIG: &str =
    "HTTP/1.1 413 Request Entity Too Large\r\nContent-Type: text/html\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>";

#[tokio::test(flavor = "multi_thread")]
async fn a_download_goes_on_where_it_broke() {
    let Some(registry) = Registry::start() else { return };
    let here = place();
    let (manifest, blobs) = image(&here.store, 1, "amd64", &[8_000_000]);
    client().push(&here.store, &manifest, &registry.reference("app:1"), &BTreeMap::new(), &quiet()).await.unwrap();
    let layer = format!("/blobs/{}", blobs[0].digest);
    let layer: &'static str = layer.leak();
    // Seven breaks are more than the retries, but each time more than 1 MiB arrives.
    let faults = (0..6).map(|_| Fault::CutDown(1_200_000)).chain([Fault::CutDown(100)]).collect();
    let proxy = Proxy::start(registry.port, layer, faults);
    let there = place();
    client().pull(&proxy.reference("app:1"), None, &there.store, &quiet()).await.unwrap();
    assert!(proxy.is_done());
    there.store.verify(&blobs[0].digest).unwrap();
    let heads = proxy.heads.lock().unwrap().to_ascii_lowercase();
    assert!(heads.matches("range: bytes=").count() >= 6, "{heads}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_never_holds_is_given_up() {
    let Some(registry) = Registry::start() else { return };
    let here = place();
    let (manifest, blobs) = image(&here.store, 1, "amd64", &[300_000]);
    client().push(&here.store, &manifest, &registry.reference("app:1"), &BTreeMap::new(), &quiet()).await.unwrap();
    let proxy = Proxy::start(registry.port, "/blobs/", vec![Fault::CutDown(0); 100]);
    let there = place();
    let error = client().fetch_blob(&proxy.reference("app:1"), &blobs[0], &there.store, &quiet()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Interrupted { .. }), "{error}");
    assert_eq!(proxy.faults.lock().unwrap().len(), 95, "five attempts");
    assert!(!there.store.has(&blobs[0].digest));
    // The writer thread may still be closing its file when the error is already here.
    let left = || std::fs::read_dir(there.dir.path().join("store/tmp")).map_or(0, Iterator::count);
    for _ in 0..100 {
        if left() == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(left(), 0, "no partial blob stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_is_started_again() {
    let Some(registry) = Registry::start() else { return };
    let here = place();
    let (manifest, blobs) = image(&here.store, 1, "amd64", &[4_000_000]);
    let proxy = Proxy::start(registry.port, "PUT /v2/app/blobs/", vec![Fault::CutUp(1_000_000), Fault::CutUp(2_000_000)]);
    client().push(&here.store, &manifest, &proxy.reference("app:1"), &BTreeMap::new(), &quiet()).await.unwrap();
    assert!(proxy.is_done() && registry.has_blob("app", &blobs[0].digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_too_big_goes_in_pieces() {
    let Some(registry) = Registry::start() else { return };
    let here = place();
    let (manifest, blobs) = image(&here.store, 1, "amd64", &[40_000_000]);
    let proxy = Proxy::start(registry.port, "", vec![Fault::Refuse("PATCH /v2/app/blobs/", TOO_BIG)]);
    client().push(&here.store, &manifest, &proxy.reference("app:1"), &BTreeMap::new(), &quiet()).await.unwrap();
    assert!(proxy.is_done() && registry.has_blob("app", &blobs[0].digest));
    let heads = proxy.heads.lock().unwrap().clone();
    assert_eq!(heads.matches("PATCH /v2/app/blobs/").count(), 1 + 3, "{heads}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_never_arrives_is_given_up_and_tells_no_secret() {
    // The state of an upload is worth as much as a password while it lives.
    let (port, log) = liar(|line| {
        if line.starts_with("POST ") {
            let location = "http://anna:hunter2@127.0.0.1:1/v2/app/x?_state=hunter3";
            let location = if line.contains("secret") { location } else { "/v2/app/blobs/uploads/1?_state=hunter3" };
            return (format!("HTTP/1.1 202 Yes\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"), vec![]);
        }
        let status = if line.starts_with("PUT ") { "" } else { "HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" };
        (status.into(), vec![])
    });
    let here = place();
    let (manifest, _) = image(&here.store, 1, "amd64", &[300_000]);
    for repository in ["app", "secret"] {
        log.lock().unwrap().clear();
        let to: Reference = format!("127.0.0.1:{port}/{repository}:1").parse().unwrap();
        let error = client().push(&here.store, &manifest, &to, &BTreeMap::new(), &quiet()).await.unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(!text.contains("hunter"), "{text}");
        let attempts = log.lock().unwrap().matches("POST /v2/").count();
        assert_eq!(attempts, 5, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_servers_are_asked_again_and_refusals_are_not() {
    let Some(registry) = Registry::start() else { return };
    let here = place();
    let (manifest, _) = image(&here.store, 1, "amd64", &[10]);
    client().push(&here.store, &manifest, &registry.reference("app:1"), &BTreeMap::new(), &quiet()).await.unwrap();
    let rows: Vec<(Vec<Fault>, usize, &str)> = vec![
        (vec![Fault::Answer(BUSY), Fault::Answer(DOWN)], 3, "ok"),
        (vec![Fault::CutUp(0), Fault::CutDown(0)], 3, "ok"),
        (vec![Fault::Answer(LATER)], 2, "ok"),
        (vec![Fault::Answer(NEVER); 9], 1, "failed with status 503"),
        (vec![Fault::Answer(DOWN); 9], 5, "failed with status 503"),
        (vec![Fault::Answer(FORBIDDEN); 9], 1, "does not allow it (DENIED: not yours [31m, anna)"),
        (vec![Fault::Answer("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"); 9], 1, "is not in the registry"),
        (
            vec![Fault::Answer("HTTP/1.1 429 No\r\nRetry-After: 99999\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"); 9],
            1,
            "wants a pause of 99999 s",
        ),
        (vec![Fault::Answer("HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"); 9], 1, "without a usable challenge"),
        (
            vec![Fault::Answer("HTTP/1.1 307 Go\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"); 9],
            1,
            "it redirects to nowhere",
        ),
        (vec![Fault::Answer("HTTP/1.1 302 Go\r\nLocation: /v2/x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"); 20], 11, "in circles"),
    ];
    for (faults, connections, expected) in rows {
        let proxy = Proxy::start(registry.port, "", faults);
        let text = match client().manifest(&proxy.reference("app:1")).await {
            Ok(fetched) => {
                assert_eq!(fetched.descriptor.digest, manifest.digest);
                "ok".to_owned()
            }
            Err(error) => error.to_string(),
        };
        assert!(text.contains(expected), "{text}");
        assert_eq!(proxy.connections.load(std::sync::atomic::Ordering::SeqCst), connections, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_bytes_are_refused() {
    let Some(registry) = Registry::start() else { return };
    let here = place();
    let (manifest, blobs) = image(&here.store, 1, "amd64", &[500_000]);
    let to = registry.reference("app:1");
    client().push(&here.store, &manifest, &to, &BTreeMap::new(), &quiet()).await.unwrap();
    let small = blobs[1].clone();
    std::fs::write(registry.blob_file(&blobs[0].digest), vec![7; 500_000]).unwrap();
    std::fs::write(registry.blob_file(&small.digest), b"short").unwrap();
    let there = place();
    for blob in [&blobs[0], &small] {
        let error = client().fetch_blob(&to, blob, &there.store, &quiet()).await.unwrap_err();
        assert!(matches!(error, RegistryError::Corrupt { .. }), "{error:?}");
        assert!(!there.store.has(&blob.digest));
    }
    // On the way, in the middle of a body.
    let (second, second_blobs) = image(&here.store, 4, "amd64", &[900_000]);
    client().push(&here.store, &second, &registry.reference("app:2"), &BTreeMap::new(), &quiet()).await.unwrap();
    let proxy = Proxy::start(registry.port, "/blobs/", vec![Fault::Garble(200_000); 5]);
    let error = client().fetch_blob(&proxy.reference("app:2"), &second_blobs[0], &there.store, &quiet()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Corrupt { .. }), "{error}");
    // A splice that went wrong is fetched once more from the start.
    let faults = vec![Fault::CutDown(400_000), Fault::Garble(100_000)];
    let proxy = Proxy::start(registry.port, "/blobs/", faults);
    client().fetch_blob(&proxy.reference("app:2"), &second_blobs[0], &there.store, &quiet()).await.unwrap();
    there.store.verify(&second_blobs[0].digest).unwrap();
    // A damaged file in our own store never becomes a blob of a registry.
    let path = here.store.blob_path(&second_blobs[0].digest);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, vec![9; 900_000]).unwrap();
    let error = client().push(&here.store, &second, &registry.reference("other:1"), &BTreeMap::new(), &quiet()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Store { .. }), "the registry is not to blame: {error}");
}

/// Answers every request of a connection with the head and body that `answer` makes of the request's first line.
fn liar(answer: impl Fn(&str) -> (String, Vec<u8>) + Send + Sync + 'static) -> (u16, std::sync::Arc<std::sync::Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let log: std::sync::Arc<std::sync::Mutex<String>> = std::sync::Arc::default();
    let kept = std::sync::Arc::clone(&log);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut head = vec![];
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                head.push(byte[0]);
            }
            let text = String::from_utf8_lossy(&head).into_owned();
            kept.lock().unwrap().push_str(&text);
            let (head, body) = answer(text.lines().next().unwrap_or_default());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        }
    });
    (port, log)
}

#[tokio::test(flavor = "multi_thread")]
async fn liars() {
    let nested = |digest: &Digest| {
        serde_json::json!({ "schemaVersion": 2, "manifests": [
            { "mediaType": media::OCI_INDEX, "digest": digest, "size": 5 << 20, "platform": { "os": "linux", "architecture": "amd64" } }
        ] })
    };
    let too_big = nested(&Digest::of(b"x")).to_string();
    let ok = |kind: &str, body: &[u8]| (format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n"), body.to_vec());
    let rows: Vec<(&str, String, Vec<u8>, &str)> = vec![
        ("no JSON", media::OCI_MANIFEST.into(), b"<html>".to_vec(), "that is no JSON object"),
        ("both", media::OCI_MANIFEST.into(), br#"{"layers":[],"manifests":[]}"#.to_vec(), "both manifest and index"),
        ("schema 1", "application/json".into(), br#"{"schemaVersion":1}"#.to_vec(), "schema 1"),
        ("endless", media::OCI_MANIFEST.into(), vec![b' '; MAX_MANIFEST as usize + 1], "more than the 4194304"),
        (
            "bad digest",
            media::OCI_MANIFEST.into(),
            br#"{"schemaVersion":2,"config":{"mediaType":"x","digest":"../../x","size":1},"layers":[]}"#.to_vec(),
            "cannot be read",
        ),
        ("big child", media::OCI_INDEX.into(), too_big.into_bytes(), "more than the 4194304"),
    ];
    for (name, kind, body, expected) in rows {
        let (port, _) = liar(move |_| ok(&kind, &body));
        let from: Reference = format!("127.0.0.1:{port}/a:1").parse().unwrap();
        let error = client().pull(&from, None, &place().store, &quiet()).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{name}: {error}");
    }
    // More bytes than the descriptor says, without a length; fewer, with a clean end.
    for (served, expected) in [(20_000_000, "got more"), (10, "got 10 bytes")] {
        let (port, _) = liar(move |_| ("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".into(), vec![0; served]));
        let from: Reference = format!("127.0.0.1:{port}/a:1").parse().unwrap();
        let blob = Descriptor {
            media_type: media::OCI_LAYER.into(),
            digest: Digest::of(b"no"),
            size: 1000,
            platform: None,
            annotations: BTreeMap::new(),
        };
        let error = client().fetch_blob(&from, &blob, &place().store, &quiet()).await.unwrap_err();
        assert!(matches!(error, RegistryError::Corrupt { .. }) && error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_stay_with_the_registry() {
    let body = b"the layer";
    let (storage, storage_log) = liar(|_| ("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".into(), b"the layer".to_vec()));
    let (port, log) = liar(move |line| {
        if line.contains("/blobs/") {
            let head = format!(
                "HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:{storage}/x?sig=1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
            return (head, vec![]);
        }
        ("HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into(), vec![])
    });
    let here = place();
    let host = format!("127.0.0.1:{port}");
    let client = client_with(here.dir.path(), &serde_json::json!({ &host: basic("anna", "hunter2") }));
    let from: Reference = format!("{host}/a:1").parse().unwrap();
    // The manifest is refused, but now the client knows what to send.
    assert!(client.manifest(&from).await.is_err());
    let blob = Descriptor {
        media_type: media::OCI_LAYER.into(),
        digest: Digest::of(body),
        size: body.len() as u64,
        platform: None,
        annotations: BTreeMap::new(),
    };
    client.fetch_blob(&from, &blob, &here.store, &quiet()).await.unwrap();
    let (to_registry, to_storage) = (log.lock().unwrap().to_lowercase(), storage_log.lock().unwrap().to_lowercase());
    assert_eq!(to_registry.matches("authorization: basic").count(), 2, "{to_registry}");
    assert!(to_storage.contains("get /x?sig=1") && !to_storage.contains("authorization"), "{to_storage}");
}

/// Takes connections, says `head` to each and nothing more; counts them.
fn silent_server(head: &'static str) -> (Reference, std::sync::Arc<std::sync::Mutex<Vec<std::net::TcpStream>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let reference = format!("127.0.0.1:{}/app:1", listener.local_addr().unwrap().port()).parse().unwrap();
    let open = std::sync::Arc::new(std::sync::Mutex::new(vec![]));
    let kept = std::sync::Arc::clone(&open);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            if !head.is_empty() {
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(head.as_bytes());
            }
            kept.lock().unwrap().push(stream);
        }
    });
    (reference, open)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_says_nothing_is_given_up() {
    let manifest = "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\nContent-Length: 99\r\n\r\n{";
    let blob = "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{";
    let limit = std::time::Duration::from_millis(300);
    let client = || {
        let timeouts = Timeouts { answer: limit, idle: limit, ..Timeouts::default() };
        Client::new(ClientOptions { timeouts, ..ClientOptions::default() })
    };
    for head in ["", manifest] {
        let (reference, connections) = silent_server(head);
        let error = client().manifest(&reference).await.unwrap_err();
        assert!(matches!(error, RegistryError::Silent { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(reference.registry()) && text.contains("silent for 0.3 s"), "{text}");
        // The body of a manifest is read once; what comes before it is asked for again.
        assert_eq!(connections.lock().unwrap().len(), if head.is_empty() { 3 } else { 1 }, "{text}");
    }
    let (reference, connections) = silent_server(blob);
    let (there, bytes) = (place(), vec![b'{'; 99]);
    let descriptor = Descriptor {
        media_type: media::OCI_CONFIG.into(),
        digest: Digest::of(&bytes),
        size: 99,
        platform: None,
        annotations: BTreeMap::new(),
    };
    let error = client().fetch_blob(&reference, &descriptor, &there.store, &quiet()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Silent { .. }), "{error}");
    assert_eq!(connections.lock().unwrap().len(), 3);
}
