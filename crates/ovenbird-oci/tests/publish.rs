//! One image, several names, several registries: all of them or none.

mod registry_servers;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ovenbird_oci::publish::{TagClass, Target};
use ovenbird_oci::registry::{Client, ClientOptions, Publication, RegistryError, RegistryOptions, Timeouts};
use ovenbird_oci::store::Store;
use ovenbird_oci::{Descriptor, Digest, Reference};
use registry_servers::*;

const FORBIDDEN: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 58\r\nConnection: close\r\n\r\n\
    {\"errors\":[{\"code\":\"DENIED\",\"message\":\"tags are frozen\"}]}";

fn target(reference: Reference, class: TagClass) -> Target {
    Target { reference, class }
}

/// Gives up soon.
fn hasty() -> Client {
    let timeouts = Timeouts { undo: Duration::from_secs(2), ..Timeouts::default() };
    Client::new(ClientOptions { timeouts, ..ClientOptions::default() })
}

async fn publish(client: &Client, store: &Store, image: &Descriptor, to: &[Target]) -> Result<(), RegistryError> {
    let origins = BTreeMap::new();
    client
        .publish(&Publication { image, store, to, origins: &origins, progress: &quiet(), head_starts: &Arc::default() }, &Arc::default())
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_name_and_every_blob_once() {
    let (Some(one), Some(two)) = (Registry::start(), Registry::start()) else { return };
    let watched = Proxy::start(one.port, "", vec![]);
    let here = place();
    let (amd, amd_blobs) = image(&here.store, 1, "amd64", &[200_000, 300_000]);
    let (arm, _) = image(&here.store, 2, "arm64", &[100_000]);
    let both = index(&here.store, &[amd.clone(), arm.clone()]);
    let to = [
        target(watched.reference("app:latest"), TagClass::Floating),
        target(watched.reference("app:1.2"), TagClass::Primary),
        target(watched.reference("team/app:1.2"), TagClass::Primary),
        target(watched.reference("app:1.2-abc"), TagClass::Unique),
        target(watched.reference("app:latest"), TagClass::Primary),
        target(two.reference("app:1.2"), TagClass::Primary),
    ];
    let client = client();
    publish(&client, &here.store, &both, &to).await.unwrap();
    for (registry, repository, tag) in
        [(&one, "app", "latest"), (&one, "app", "1.2"), (&one, "app", "1.2-abc"), (&one, "team/app", "1.2"), (&two, "app", "1.2")]
    {
        assert_eq!(registry.tag(repository, tag), Some(both.digest), "{repository}:{tag}");
    }
    assert!(one.has_blob("team/app", &amd_blobs[0].digest));
    let heads = watched.heads.lock().unwrap().clone();
    let sent = heads.lines().filter(|l| l.starts_with("PUT /v2/app/blobs/uploads/")).count();
    let again = heads.lines().filter(|l| l.starts_with("PUT /v2/team/app/blobs/uploads/")).count();
    let mounted = heads.lines().filter(|l| l.starts_with("POST /v2/team/app/blobs/uploads/?mount=")).count();
    assert_eq!((sent, again, mounted), (5, 0, 5), "three layers and two configs");
    let puts: Vec<&str> = heads.lines().filter(|l| l.starts_with("PUT /v2/") && l.contains("/manifests/")).collect();
    let place_of = |tag: &str| puts.iter().position(|l| l.contains(&format!("/manifests/{tag} "))).unwrap();
    assert!(puts[..place_of("1.2-abc")].iter().all(|l| l.contains("/manifests/sha256:")), "{puts:?}");
    assert!(place_of("1.2-abc") < place_of("1.2") && place_of("1.2") < place_of("latest"), "{puts:?}");
    assert_eq!(puts.len(), 3 + 3 + 4, "each manifest once in each repository, each name once");
    // The same again moves nothing.
    watched.heads.lock().unwrap().clear();
    publish(&client, &here.store, &both, &to).await.unwrap();
    assert!(!watched.heads.lock().unwrap().contains("/manifests/latest HTTP/1.1\ncontent-type"), "no tag is put that is right");
}

/// Publishes a first image as `app:1` and `app:latest`; gives it and a second one.
async fn two_images(here: &Place, registries: &[&Registry]) -> (Descriptor, Descriptor) {
    let (old, _) = image(&here.store, 1, "amd64", &[1000]);
    let (new, _) = image(&here.store, 50, "amd64", &[2000]);
    let names: Vec<Target> = registries.iter().map(|r| Target::from(r.reference("app:latest"))).collect();
    publish(&client(), &here.store, &old, &names).await.unwrap();
    (old, new)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_name_takes_the_others_back() {
    let (Some(one), Some(two), Some(three)) = (Registry::start(), Registry::start(), Registry::start()) else { return };
    let here = place();
    let (old, new) = two_images(&here, &[&one, &two, &three]).await;
    // Something else has the digest of the new image: it must not go when the new tag goes.
    publish(&client(), &here.store, &new, &[Target::from(one.reference("app:keep"))]).await.unwrap();
    let frozen = Proxy::start(three.port, "", vec![Fault::Refuse("PUT /v2/app/manifests/latest", FORBIDDEN)]);
    let to = [
        target(one.reference("app:latest"), TagClass::Floating),
        target(one.reference("app:2"), TagClass::Primary),
        target(two.reference("app:latest"), TagClass::Floating),
        target(two.reference("app:2-u"), TagClass::Unique),
        target(frozen.reference("app:2"), TagClass::Primary),
        target(frozen.reference("app:latest"), TagClass::Floating),
    ];
    let error = publish(&client(), &here.store, &new, &to).await.unwrap_err();
    assert!(frozen.is_done());
    for registry in [&one, &two, &three] {
        assert_eq!(registry.tag("app", "latest"), Some(old.digest));
        assert_eq!((registry.tag("app", "2"), registry.tag("app", "2-u")), (None, None));
    }
    assert_eq!(one.tag("app", "keep"), Some(new.digest), "a name of somebody else stays");
    assert!(client().head(&one.reference("app:keep")).await.unwrap().is_some_and(|found| found.digest == new.digest));
    let text = error.to_string();
    for part in [
        &format!(
            "cannot put the tag {}: 127.0.0.1:{} does not allow it (DENIED: tags are frozen)",
            frozen.reference("app:latest"),
            frozen.port
        ),
        &format!("{} was removed again", one.reference("app:2")),
        &format!("{} was removed again", two.reference("app:2-u")),
        &format!("{} is what it was before", one.reference("app:latest")),
    ] {
        assert!(text.contains(part.as_str()), "{part}\nin {text}");
    }
    assert!(!text.contains("could not be taken back"), "{text}");
    // Nothing is in the way of the next one.
    publish(&client(), &here.store, &new, &to).await.unwrap();
    assert_eq!(three.tag("app", "latest"), Some(new.digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_taken_back_is_said() {
    let (Some(keeps), Some(one), here) = (Registry::start(), Registry::start(), place()) else { return };
    let (old, new) = two_images(&here, &[&keeps]).await;
    // A registry that removes nothing, as many are set up.
    let unsupported: &str = "HTTP/1.1 405 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let firm = Proxy::start(keeps.port, "DELETE ", vec![Fault::Answer(unsupported); 4]);
    let frozen = Proxy::start(one.port, "", vec![Fault::Refuse("PUT /v2/app/manifests/latest", FORBIDDEN)]);
    let to = [
        target(firm.reference("app:2"), TagClass::Primary),
        target(firm.reference("app:latest"), TagClass::Primary),
        target(frozen.reference("app:latest"), TagClass::Floating),
    ];
    let text = publish(&client(), &here.store, &new, &to).await.unwrap_err().to_string();
    assert_eq!(keeps.tag("app", "latest"), Some(old.digest), "what was there before is put back by a put");
    assert_eq!(keeps.tag("app", "2"), Some(new.digest));
    assert!(text.contains(&format!("{} may be the new image now", firm.reference("app:2"))), "{text}");
    assert!(text.contains("does not allow it (it removes nothing)"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_killed_leaves_no_half_moved_name() {
    let (Some(one), Some(two), Some(mut three)) = (Registry::start(), Registry::start(), Registry::start()) else { return };
    let here = place();
    let (old, _) = two_images(&here, &[&one, &two, &three]).await;
    let (mut failed, mut unknown, mut now) = (0_u64, 0, old.digest);
    let rounds = std::env::var("OVENBIRD_PUBLISH_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(5_u64);
    for round in 0..rounds {
        let (new, _) = image(&here.store, 100 + round * 10, "amd64", &[1000]);
        let unique = format!("u{round}");
        let mut to = vec![];
        for registry in [&one, &two, &three] {
            to.push(target(registry.reference(&format!("app:{unique}")), TagClass::Unique));
            to.push(target(registry.reference("app:latest"), TagClass::Floating));
        }
        let (client, store, image) = (hasty(), here.store.clone(), new.clone());
        let running = tokio::spawn(async move { publish(&client, &store, &image, &to).await });
        // As soon as the first name stands somewhere, or a little later.
        while one.tag("app", &unique).is_none() && two.tag("app", &unique).is_none() && !running.is_finished() {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        tokio::time::sleep(Duration::from_millis(round % 12 * 3)).await;
        three.kill();
        let back_soon = round % 2 == 0;
        if back_soon {
            tokio::time::sleep(Duration::from_millis(500)).await;
            three.restart();
        }
        let result = running.await.unwrap();
        if !back_soon {
            three.restart();
        }
        let expected = match &result {
            Ok(()) => (Some(new.digest), Some(new.digest)),
            Err(_) => (None, Some(now)),
        };
        let text = result.as_ref().map_or_else(ToString::to_string, |()| "published".into());
        for registry in [&one, &two] {
            assert_eq!((registry.tag("app", &unique), registry.tag("app", "latest")), expected, "{round}: {text}");
        }
        let third = (three.tag("app", &unique), three.tag("app", "latest"));
        let named = |tag: &str| text.contains(&format!("{} may be the new image now", three.reference(&format!("app:{tag}"))));
        // It may have died after it took a name and before it said so; when it does not come back, that can only be said.
        assert!(third.0 == expected.0 || (!back_soon && named(&unique)), "{round}: {third:?} {text}");
        assert!(third.1 == expected.1 || (!back_soon && named("latest")), "{round}: {third:?} {text}");
        if result.is_ok() {
            now = new.digest;
        } else {
            failed += 1;
            unknown += usize::from(third != expected);
            let all: Vec<Target> = [&one, &two, &three].map(|r| Target::from(r.reference("app:latest"))).into();
            publish(&hasty(), &here.store, &new, &all).await.unwrap();
            now = new.digest;
        }
    }
    assert!(failed > 0, "the registry was always killed too late");
    if let Some(path) = std::env::var_os("OVENBIRD_TOXIC_TABLE") {
        let row = format!("| killed | {rounds} | {} | {failed} | 0 | {unknown} |\n", rounds - failed);
        std::io::Write::write_all(&mut std::fs::File::options().append(true).create(true).open(path).unwrap(), row.as_bytes()).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_tag_is_removed_with_tokens_too() {
    let (Some((registry, server)), Some(one)) = (with_tokens(), Registry::start()) else { return };
    let here = place();
    let (new, _) = image(&here.store, 50, "amd64", &[2000]);
    let frozen = Proxy::start(one.port, "", vec![Fault::Refuse("PUT /v2/app/manifests/latest", FORBIDDEN)]);
    let client = client_with(here.dir.path(), &serde_json::json!({ registry.host(): basic("anna", "pass:word") }));
    let to = [registry.reference("team/app:1").into(), target(frozen.reference("app:latest"), TagClass::Floating)];
    let text = publish(&client, &here.store, &new, &to).await.unwrap_err().to_string();
    assert!(text.contains("/team/app:1 was removed again"), "{text}");
    assert_eq!(registry.tag("team/app", "1"), None);
    assert!(server.requests().iter().any(|line| line.contains("repository:team/app:delete")), "{:?}", server.requests());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_its_registry_cannot_read_is_put() {
    let Some(one) = Registry::start() else { return };
    let here = place();
    let (_, new) = two_images(&here, &[&one]).await;
    // As a registry leaves it that is killed while it writes.
    let link = one.dir.path().join("data/docker/registry/v2/repositories/app/_manifests/tags/latest/current/link");
    std::fs::write(&link, "").unwrap();
    publish(&client(), &here.store, &new, &[one.reference("app:latest").into()]).await.unwrap();
    assert_eq!(one.tag("app", "latest"), Some(new.digest));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_that_is_stopped_is_taken_back() {
    let (Some(one), Some(two)) = (Registry::start(), Registry::start()) else { return };
    let here = place();
    let (old, new) = two_images(&here, &[&one, &two]).await;
    let stop = Arc::new(AtomicBool::new(false));
    let to = [
        target(one.reference("app:u"), TagClass::Unique),
        target(one.reference("app:latest"), TagClass::Floating),
        target(two.reference("app:latest"), TagClass::Floating),
    ];
    let watched = (one.dir.path().join("data/docker/registry/v2/repositories/app/_manifests/tags/u"), Arc::clone(&stop));
    std::thread::spawn(move || {
        while !watched.0.exists() {
            std::thread::sleep(Duration::from_micros(100));
        }
        watched.1.store(true, Ordering::SeqCst);
    });
    let (origins, progress, client) = (BTreeMap::new(), quiet(), client());
    let publication =
        Publication { image: &new, store: &here.store, to: &to, origins: &origins, progress: &progress, head_starts: &Arc::default() };
    let result = client.publish(&publication, &stop).await;
    let expected = if result.is_ok() { (Some(new.digest), Some(new.digest)) } else { (None, Some(old.digest)) };
    assert_eq!((one.tag("app", "u"), one.tag("app", "latest")), expected, "{result:?}");
    assert_eq!(two.tag("app", "latest"), expected.1);
    // Before anything moved.
    let error = client.publish(&publication, &Arc::new(AtomicBool::new(true))).await;
    assert!(result.is_ok() || matches!(error, Err(RegistryError::Cancelled { .. })), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_says_nothing_does_not_keep_the_user() {
    let (Some(one), here) = (Registry::start(), place()) else { return };
    let (old, new) = two_images(&here, &[&one]).await;
    // It takes the name after a minute, or never.
    let mute = Proxy::start(one.port, "PUT /v2/app/manifests/latest", vec![Fault::Hang]);
    let (to, stop) = ([Target::from(mute.reference("app:latest"))], Arc::new(AtomicBool::new(false)));
    let (origins, progress, client) = (BTreeMap::new(), quiet(), hasty());
    let publication =
        Publication { image: &new, store: &here.store, to: &to, origins: &origins, progress: &progress, head_starts: &Arc::default() };
    let (set, faults) = (Arc::clone(&stop), Arc::clone(&mute.faults));
    std::thread::spawn(move || {
        while !faults.lock().unwrap().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        set.store(true, Ordering::SeqCst);
    });
    let start = std::time::Instant::now();
    let error = client.publish(&publication, &stop).await.unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(one.tag("app", "latest"), Some(old.digest), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_that_was_killed_is_completed_by_the_next() {
    let (Some(one), Some(two), here) = (Registry::start(), Registry::start(), place()) else { return };
    let (_, new) = two_images(&here, &[&one, &two]).await;
    let mut to = vec![];
    for registry in [&one, &two] {
        to.push(target(registry.reference("app:u"), TagClass::Unique));
        to.push(target(registry.reference("app:2"), TagClass::Primary));
        to.push(target(registry.reference("app:latest"), TagClass::Floating));
    }
    let (store, image, names) = (here.store.clone(), new.clone(), to.clone());
    let running = tokio::spawn(async move { publish(&client(), &store, &image, &names).await });
    while one.tag("app", "u").is_none() && !running.is_finished() {
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    running.abort();
    let _ = running.await;
    publish(&client(), &here.store, &new, &to).await.unwrap();
    for registry in [&one, &two] {
        for tag in ["u", "2", "latest"] {
            assert_eq!(registry.tag("app", tag), Some(new.digest), "{tag}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_digest_than_the_name_says() {
    let here = place();
    let (new, _) = image(&here.store, 1, "amd64", &[1000]);
    let to: Reference = format!("127.0.0.1:1/app@{}", Digest::of(b"another")).parse().unwrap();
    let error = publish(&client(), &here.store, &new, &[to.into()]).await.unwrap_err();
    assert!(matches!(error, RegistryError::Corrupt { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_wants_it_slow() {
    let Some(registry) = Registry::start() else { return };
    let here = place();
    let (new, _) = image(&here.store, 1, "amd64", &[1000, 1001, 1002, 1003]);
    let options = RegistryOptions { transfers: Some(1), requests_per_second: Some(10.0), ..RegistryOptions::default() };
    let client = client_for(&registry.host(), options);
    let start = std::time::Instant::now();
    publish(&client, &here.store, &new, &[registry.reference("app:1").into()]).await.unwrap();
    // Five blobs of three requests each, and the manifest: a second's worth of them goes at once.
    assert!(start.elapsed() > Duration::from_millis(700), "{:?}", start.elapsed());
}
