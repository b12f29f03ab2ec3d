//! Credentials that run out while work goes on: looked up again once for all requests, and never more often than helps.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ovenbird_oci::registry::{Client, ClientOptions, RegistryError, Verdict};

mod registry_servers;
use registry_servers::*;

/// A helper that gives the account in `who` (two lines: name, secret) and notes each call in `calls`.
fn helper(dir: &Path, registry: &str) -> Client {
    let bin = dir.join("bin");
    let docker = dir.join("docker");
    std::fs::create_dir_all(&bin).unwrap();
    std::fs::create_dir_all(&docker).unwrap();
    let script = format!(
        "#!/bin/sh\ncat >/dev/null\necho call >> {0}/calls\n{{ read name; read secret; }} < {0}/who\nprintf '{{\"Username\":\"%s\",\"Secret\":\"%s\"}}' \"$name\" \"$secret\"\n",
        dir.display()
    );
    let path = bin.join("docker-credential-test");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(docker.join("config.json"), format!("{{\"credHelpers\":{{\"{registry}\":\"test\"}}}}")).unwrap();
    let path = std::env::join_paths([bin.as_path(), Path::new("/usr/bin"), Path::new("/bin")]).unwrap();
    Client::with_search_path(ClientOptions { docker_config: Some(docker), ..ClientOptions::default() }, path)
}

fn who(dir: &Path, name: &str, secret: &str) {
    std::fs::write(dir.join("who"), format!("{name}\n{secret}\n")).unwrap();
}

fn calls(dir: &Path) -> usize {
    std::fs::read_to_string(dir.join("calls")).unwrap_or_default().lines().count()
}

/// So many requests at once; how they end.
async fn ask(client: &Client, reference: &ovenbird_oci::Reference, times: usize) -> Vec<Result<bool, RegistryError>> {
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..times {
        let (client, reference) = (client.clone(), reference.clone());
        tasks.spawn(async move { client.head(&reference).await.map(|found| found.is_some()) });
    }
    tasks.join_all().await
}

#[tokio::test]
async fn a_password_that_changes_is_looked_up_once_for_all() {
    let Some(registry) = Registry::start_with_password() else { return };
    let temp = tempfile::tempdir().unwrap();
    let client = helper(temp.path(), &registry.host());
    let reference = registry.reference("team/app:1");
    who(temp.path(), "anna", "pass:word");
    assert!(ask(&client, &reference, 8).await.into_iter().all(|r| matches!(r, Ok(false))));
    assert_eq!(calls(temp.path()), 1);
    // The registry takes another one from now on; the file's time is looked at in seconds.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let line = Command::new("htpasswd").args(["-Bbn", "anna", "next"]).output().unwrap().stdout;
    std::fs::write(registry.dir.path().join("htpasswd"), line).unwrap();
    who(temp.path(), "anna", "next");
    assert!(ask(&client, &reference, 16).await.into_iter().all(|r| matches!(r, Ok(false))));
    assert_eq!(calls(temp.path()), 2, "one renewal for sixteen requests");
    // And when the source has nothing better: refused, with one look for each request at most.
    std::fs::write(registry.dir.path().join("htpasswd"), "").unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    std::fs::write(registry.dir.path().join("htpasswd"), "x:y\n").unwrap();
    let error = client.head(&reference).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }) && error.to_string().contains("docker-credential-test"), "{error}");
    assert_eq!(calls(temp.path()), 3);
}

#[tokio::test]
async fn an_identity_token_that_ran_out_is_looked_up_again() {
    let Some((registry, tokens)) = with_tokens() else { return };
    let temp = tempfile::tempdir().unwrap();
    let client = helper(temp.path(), &registry.host());
    tokens.life.store(2, std::sync::atomic::Ordering::SeqCst);
    who(temp.path(), "<token>", "refresh-me");
    assert!(client.head(&registry.reference("team/app:1")).await.unwrap().is_none());
    // As Azure's after three hours: the token server refuses the old one while the build goes on.
    who(temp.path(), "<token>", "worn-out");
    let fresh = helper(temp.path(), &registry.host());
    let error = fresh.head(&registry.reference("team/app:1")).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }), "{error}");
    who(temp.path(), "<token>", "refresh-me");
    let before = calls(temp.path());
    let ended = ask(&fresh, &registry.reference("team/app:1"), 8).await;
    assert!(ended.iter().all(|r| matches!(r, Ok(false))), "{ended:?}");
    assert_eq!(calls(temp.path()), before + 1);
}

#[tokio::test]
async fn what_may_be_done_with_tokens() {
    let Some((registry, tokens)) = with_tokens() else { return };
    let temp = tempfile::tempdir().unwrap();
    let client = |user: &str, password: &str| {
        let auths = if user.is_empty() { serde_json::json!({}) } else { serde_json::json!({ registry.host(): basic(user, password) }) };
        client_with(temp.path(), &auths)
    };
    let say = |verdict: &Verdict| match verdict {
        Verdict::Allowed => "allowed",
        Verdict::Missing => "missing",
        Verdict::Refused(_) => "refused",
    };
    for (user, password, repository, pull, push) in [
        ("anna", "pass:word", "private/app", "missing", "allowed"),
        // The token server gives a token without the right to push.
        ("bert", "x", "public/app", "missing", "refused"),
        ("bert", "x", "private/app", "refused", "refused"),
        ("", "", "public/app", "missing", "refused"),
        ("", "", "private/app", "refused", "refused"),
        ("bert", "wrong", "public/app", "refused", "refused"),
    ] {
        let access = client(user, password).check_access(&registry.reference(repository), true).await.unwrap();
        let got = (say(&access.pull), access.push.as_ref().map(say));
        assert_eq!(got, (pull, Some(push)), "{user} {repository}: {access:?}");
        assert_eq!(access.username.as_deref(), Some(user).filter(|u| !u.is_empty()));
        assert!(!format!("{access:?}").contains("pass:word"));
    }
    // Without the question no right to push is asked for.
    let before = tokens.requests().len();
    let access = client("anna", "pass:word").check_access(&registry.reference("private/app"), false).await.unwrap();
    assert!(access.push.is_none() && tokens.requests()[before..].iter().all(|line| !line.contains("push")), "{:?}", tokens.requests());
}
