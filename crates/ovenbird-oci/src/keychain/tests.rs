//! Of the whole module: files, helpers, variables, settings.

use std::os::unix::fs::PermissionsExt;

use super::docker::HUB_KEY;
use super::*;

impl Keychain {
    async fn get(&self, registry: &str, repository: &str) -> Result<Option<Credential>, KeychainError> {
        let found = self.find(Query { registry, repository, address: None, refused: None }).await?;
        Ok(found.map(|found| found.credential))
    }
}

fn keychain(dir: &Path) -> Keychain {
    Keychain::new(KeychainOptions {
        docker_config: Some(dir.join("docker")),
        auth_file: Some(dir.join("auth.json")),
        ..KeychainOptions::default()
    })
    .with_search_path(dir.join("bin").into())
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn helper(dir: &Path, name: &str, script: &str) {
    let path = dir.join("bin").join(format!("docker-credential-{name}"));
    write(&path, &format!("#!/bin/sh\n{script}\n"));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn show(found: Result<Option<Credential>, KeychainError>) -> String {
    match found {
        Ok(None) => "none".into(),
        Ok(Some(Credential::Password { username, password })) => format!("{username}:{}", password.expose()),
        Ok(Some(Credential::IdentityToken(t))) => format!("identity {}", t.expose()),
        Ok(Some(Credential::RegistryToken(t))) => format!("bearer {}", t.expose()),
        Err(e) => format!("error {}", e.to_string().split(';').next().unwrap().replace(char::is_whitespace, " ")),
    }
}

/// Credentials are `name:secret`; base64 of them is made here.
fn auths(entries: &[(&str, &str)]) -> String {
    let map: Map<_, _> = entries.iter().map(|(k, v)| ((*k).to_owned(), serde_json::json!({ "auth": BASE64.encode(v) }))).collect();
    serde_json::json!({ "auths": map }).to_string()
}

#[tokio::test]
async fn precedence() {
    let prefixes = auths(&[("h.test", "host:1"), ("h.test/org", "org:2"), ("h.test/org/app", "app:3"), ("h.test/or", "no:0")]);
    let token = r#"{"auths":{"h.test":{"auth":"YTpi","identitytoken":"idt"}}}"#.to_owned();
    let rows: Vec<(String, &str, &str, &str, &str)> = vec![
        ("{}".into(), "", "h.test", "a", "none"),
        (String::new(), "", "h.test", "a", "none"),
        (auths(&[("h.test", "u:p")]), "", "h.test", "a", "u:p"),
        (auths(&[("h.test", "u:p:with:colons")]), "", "h.test", "a", "u:p:with:colons"),
        (auths(&[("h.test", "u:p\0\0")]), "", "h.test", "a", "u:p"),
        (auths(&[("h.test", "u:p")]), "", "h.test:5000", "a", "none"),
        (auths(&[("h.test:5000", "u:p")]), "", "h.test:5000", "a", "u:p"),
        (auths(&[("https://h.test", "u:p")]), "", "h.test", "a", "u:p"),
        (auths(&[("https://h.test/v1/", "u:p")]), "", "h.test", "a", "u:p"),
        (auths(&[("http://h.test/v2/", "u:p")]), "", "h.test", "a", "u:p"),
        (auths(&[("h.test/v1/", "u:p")]), "", "h.test", "a", "u:p"),
        (auths(&[("https://h.test", "scheme:1"), ("h.test", "bare:2")]), "", "h.test", "a", "bare:2"),
        (auths(&[("https://index.docker.io/v1/", "hub:p")]), "", "docker.io", "library/a", "hub:p"),
        (auths(&[("index.docker.io", "hub:p")]), "", "docker.io", "library/a", "hub:p"),
        (auths(&[("docker.io", "hub:p")]), "", "docker.io", "library/a", "hub:p"),
        (auths(&[("docker.io/org", "org:p")]), "", "docker.io", "library/a", "none"),
        (prefixes.clone(), "", "h.test", "x", "host:1"),
        (prefixes.clone(), "", "h.test", "org/x", "org:2"),
        (prefixes.clone(), "", "h.test", "org/app", "app:3"),
        (prefixes.clone(), "", "h.test", "org/app/sub", "app:3"),
        (prefixes.clone(), "", "h.test", "org/apple", "org:2"),
        (prefixes, "", "h.test", "orga/x", "host:1"),
        (token, "", "h.test", "a", "identity idt"),
        (r#"{"auths":{"h.test":{"registrytoken":"rt"}}}"#.into(), "", "h.test", "a", "bearer rt"),
        (r#"{"auths":{"h.test":{"username":"u","password":"p"}}}"#.into(), "", "h.test", "a", "u:p"),
        (r#"{"auths":{"h.test":{}}}"#.into(), "", "h.test", "a", "none"),
        // The second file counts only when the first has nothing.
        (auths(&[("h.test", "first:1")]), "second:2", "h.test", "a", "first:1"),
        (auths(&[("other.test", "first:1")]), "second:2", "h.test", "a", "second:2"),
        // Helpers.
        (r#"{"credHelpers":{"h.test":"good"}}"#.into(), "", "h.test", "a", "h.test:good"),
        (r#"{"credHelpers":{"h.test":"good"}}"#.into(), "", "g.test", "a", "none"),
        (r#"{"credHelpers":{"h.test":"good"},"credsStore":"token"}"#.into(), "", "h.test", "a", "h.test:good"),
        (r#"{"credHelpers":{"h.test":"empty"},"credsStore":"token"}"#.into(), "", "h.test", "a", "identity tok"),
        (r#"{"credsStore":"token"}"#.into(), "", "h.test", "a", "identity tok"),
        (r#"{"credsStore":"good"}"#.into(), "", "docker.io", "library/a", "https://index.docker.io/v1/:good"),
        (r#"{"credsStore":"empty","auths":{"h.test":{"auth":"dTpw"}}}"#.into(), "", "h.test", "a", "u:p"),
        (r#"{"credsStore":"broken","auths":{"h.test":{"auth":"dTpw"}}}"#.into(), "", "h.test", "a", "u:p"),
        (r#"{"credsStore":"empty"}"#.into(), "second:2", "h.test", "a", "second:2"),
        (r#"{"credsStore":"broken"}"#.into(), "", "h.test", "a", "error docker-credential-broken get failed: exit status: 3: no session"),
        (
            r#"{"credsStore":"chatty"}"#.into(),
            "",
            "h.test",
            "a",
            "error docker-credential-chatty get failed: its answer is not a JSON object",
        ),
    ];
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    helper(dir, "good", r#"read key; printf '{"Username":"%s","Secret":"good"}' "$key""#);
    helper(dir, "token", r#"cat >/dev/null; echo '{"Username":"<token>","Secret":"tok"}'"#);
    helper(dir, "empty", r#"cat >/dev/null; echo "credentials not found in native keychain"; exit 1"#);
    helper(dir, "broken", "echo 'no session' >&2; exit 3");
    helper(dir, "chatty", "cat >/dev/null; echo hello");
    for (config, second, registry, repository, expected) in rows {
        write(&dir.join("docker/config.json"), &config);
        let second = if second.is_empty() { String::new() } else { auths(&[("h.test", second)]) };
        write(&dir.join("auth.json"), &second);
        assert_eq!(show(keychain(dir).get(registry, repository).await), expected, "{config} {registry}/{repository}");
    }
    let refused = [
        ("not json", "is not a Docker configuration file: no JSON at line 1, column 2"),
        ("[]", "is not a Docker configuration file: it is no JSON object"),
        (r#"{"auths":{"h.test":{"auth":"%%"}}}"#, r#"is not a Docker configuration file: `auth` of "h.test" is not base64"#),
        (r#"{"credsStore":"../evil"}"#, "which is not a plain program name"),
        (r#"{"credsStore":"absent"}"#, "docker-credential-absent, which"),
    ];
    for (config, expected) in refused {
        write(&dir.join("docker/config.json"), config);
        let error = keychain(dir).get("h.test", "a").await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn what_is_broken_is_no_anonymous_access_and_shows_no_secret() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    for (config, expected) in [
        (r#"{"auths":["hunter2"]}"#, "`auths` is no JSON object"),
        (r#"{"auths":{"h.test":{"auth":5}}}"#, r#"`auth` of "h.test" is no text"#),
        (r#"{"auths":{"h.test":"hunter2"}}"#, r#""h.test" of `auths` is no JSON object"#),
        (r#"{"auths":{"h.test":{"password":"hunter2"}}}"#, r#""h.test" has a `password` and no `username`"#),
        (r#"{"auths":{"h.test":{"username":"bob"}}}"#, r#""h.test" has a `username` and no `password`"#),
        (r#"{"auths":{"h.test":{"username":"bob","password":{"x":"hunter2"}}}}"#, r#"`password` of "h.test" is no text"#),
        (r#"{"auths":{"h.test":{"identitytoken":["hunter2"]}}}"#, r#"`identitytoken` of "h.test" is no text"#),
        (r#"{"credHelpers":["hunter2"]}"#, "`credHelpers` is no JSON object"),
        (r#"{"credHelpers":{"h.test":7}}"#, r#"the helper of "h.test" is no text"#),
        (r#"{"credsStore":7}"#, r#"the helper of "credsStore" is no text"#),
    ] {
        write(&dir.join("docker/config.json"), config);
        let error = show(keychain(dir).get("h.test", "a").await);
        assert!(error.contains(&format!("docker/config.json is not a Docker configuration file: {expected}")), "{config}: {error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
    for config in [r#"{"auths":null,"credHelpers":null,"credsStore":null}"#, r#"{"auths":{"h.test":{},"g.test":5}}"#] {
        write(&dir.join("docker/config.json"), config);
        assert_eq!(show(keychain(dir).get("h.test", "a").await), "none", "{config}");
    }
    write(&dir.join("docker/config.json"), r#"{"credsStore":"odd"}"#);
    for (script, expected) in [
        (r#"echo '{"Username":"bob","Secret":["hunter2"]}'"#, "get failed: `Secret` of its answer is no text"),
        (r#"echo '{"Username":["hunter2"],"Secret":"hunter2"}'"#, "get failed: `Username` of its answer is no text"),
        (r#"echo '{"Username":"bob"}'"#, "get failed: its answer has a `Username` and no `Secret`"),
        (r#"echo '{"Username":"bob","Secret":"hunter2"}'; exit 1"#, "get failed: exit status: 1"),
        (r"echo hunter2; printf 'a\033[31mb\nhunter2' >&2; exit 1", r"get failed: exit status: 1: a\u{1b}[31mb"),
        ("echo hunter2 credentials not found; exit 1", "get failed: exit status: 1"),
    ] {
        helper(dir, "odd", &format!("cat >/dev/null; {script}"));
        assert_eq!(show(keychain(dir).get("h.test", "a").await), format!("error docker-credential-odd {expected}"), "{script}");
    }
}

#[tokio::test]
async fn a_pipe_is_no_file() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let pipe = dir.join("auth.json");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    let error = show(keychain(dir).get("h.test", "a").await);
    assert!(error.contains("auth.json: it is no regular file"), "{error}");
    let sources = [("h.test".to_owned(), Source::PasswordFile { username: "me".into(), path: pipe })].into();
    let error = show(Keychain::new(KeychainOptions { sources, ..KeychainOptions::default() }).get("h.test", "a").await);
    assert!(error.contains("auth.json: it is no regular file"), "{error}");
}

#[tokio::test]
async fn a_helper_that_leaves_a_process_behind_is_heard() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    helper(dir, "forks", r#"cat >/dev/null; sleep 20 & printf '{"Username":"u","Secret":"p"}'"#);
    write(&dir.join("docker/config.json"), r#"{"credsStore":"forks"}"#);
    let begin = Instant::now();
    assert_eq!(show(keychain(dir).get("h.test", "a").await), "u:p");
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_helper_that_hangs_is_stopped() {
    let temp = tempfile::tempdir().unwrap();
    helper(temp.path(), "slow", "exec sleep 60");
    write(&temp.path().join("docker/config.json"), r#"{"credsStore":"slow"}"#);
    let mut keychain = keychain(temp.path());
    keychain.timeout = Some(Duration::from_millis(200));
    let error = keychain.get("h.test", "a").await.unwrap_err().to_string();
    assert!(error.contains("gave no answer"), "{error}");
}

#[tokio::test]
async fn login_and_logout_keep_the_rest_of_the_file() {
    let temp = tempfile::tempdir().unwrap();
    let real = temp.path().join("real.json");
    let link = temp.path().join("docker/config.json");
    write(&real, r#"{"zebra":[1,2.50],"auths":{"https://h.test/v1/":{"auth":"b2xkOm9sZA=="},"g.test":{"auth":"Zzpn"}},"alpha":{}}"#);
    std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o640)).unwrap();
    std::fs::create_dir_all(link.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let keychain = keychain(temp.path());
    assert_eq!(keychain.store("h.test", "new", &Secret::new("pass:word")).await.unwrap(), Kept::File(link.clone()));
    assert_eq!(show(keychain.get("h.test", "a").await), "new:pass:word");
    assert!(link.is_symlink());
    assert_eq!(std::fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o640);
    let text = std::fs::read_to_string(&real).unwrap();
    let keys: Vec<_> = ["zebra", "auths", "g.test", "h.test", "alpha"].iter().map(|k| text.find(k).unwrap()).collect();
    assert!(keys.is_sorted() && !text.contains("/v1/"), "{text}");
    assert_eq!(keychain.erase("h.test").await.unwrap(), [Kept::File(link.clone())]);
    assert_eq!(keychain.erase("h.test").await.unwrap(), []);
    assert_eq!(show(keychain.get("g.test", "a").await), "g:g");
    // Docker Hub is kept under docker's key; a new file is private; nothing is left beside it.
    std::fs::remove_file(&link).unwrap();
    keychain.store("docker.io", "u", &Secret::new("p")).await.unwrap();
    assert!(std::fs::read_to_string(&link).unwrap().contains(HUB_KEY));
    assert_eq!(std::fs::metadata(&link).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(link.parent().unwrap()).unwrap().count(), 1);
    // What cannot be read is not overwritten.
    write(&link, "broken");
    assert!(keychain.store("docker.io", "u", &Secret::new("p")).await.is_err());
    assert_eq!(std::fs::read_to_string(&link).unwrap(), "broken");
    assert!(matches!(Keychain::default().store("h", "u", &Secret::default()).await, Err(KeychainError::NoPlace)));
}

#[tokio::test]
async fn login_through_a_helper() {
    let temp = tempfile::tempdir().unwrap();
    let kept = temp.path().join("kept");
    let script = format!(
        r"case $1 in store) cat >{0};; get) cat {0} 2>/dev/null || {{ echo credentials not found in native keychain; exit 1; }};; erase) rm {0};; esac",
        kept.display()
    );
    helper(temp.path(), "file", &script);
    write(&temp.path().join("docker/config.json"), r#"{"credsStore":"file"}"#);
    let keychain = keychain(temp.path());
    let place = Kept::Helper("docker-credential-file".into());
    assert_eq!(keychain.store("h.test", "u", &Secret::new("\"quoted\"")).await.unwrap(), place);
    assert_eq!(show(keychain.get("h.test", "a").await), "u:\"quoted\"");
    assert_eq!(keychain.erase("h.test").await.unwrap(), [place]);
    assert!(!kept.exists());
    assert!(!std::fs::read_to_string(temp.path().join("docker/config.json")).unwrap().contains("auths"));
}

#[test]
fn names_and_secrecy() {
    let rows = [
        ("docker.io", "docker.io"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("", "docker.io"),
        ("https://h.test/v2/", "h.test"),
        ("h.test:5000/org", "h.test:5000"),
    ];
    for (text, expected) in rows {
        assert_eq!(registry_name(text), expected);
    }
    let credential = Credential::Password { username: "u".into(), password: Secret::new("hunter2") };
    assert!(!format!("{credential:?}").contains("hunter2"));
}

fn variables(pairs: &[(&str, &str)]) -> Variables {
    pairs.iter().copied().collect()
}

#[tokio::test]
async fn variables_named_after_the_registry() {
    let temp = tempfile::tempdir().unwrap();
    write(&temp.path().join("docker/config.json"), &auths(&[("h.test", "file:1"), ("h.test:5000", "file:2")]));
    for (registry, named, pairs, expected) in [
        ("h.test", false, &[("OVENBIRD_REGISTRY_H_TEST_USERNAME", "u"), ("OVENBIRD_REGISTRY_H_TEST_PASSWORD", "p")][..], "u:p"),
        (
            "my-h.test:5000",
            false,
            &[("OVENBIRD_REGISTRY_MY_H_TEST_5000_USERNAME", "u"), ("OVENBIRD_REGISTRY_MY_H_TEST_5000_PASSWORD", "p")],
            "u:p",
        ),
        ("docker.io", false, &[("OVENBIRD_REGISTRY_DOCKER_IO_USERNAME", "u"), ("OVENBIRD_REGISTRY_DOCKER_IO_PASSWORD", "p")], "u:p"),
        ("168.32.25.1:5000", false, &[("168_32_25_1_5000_USERNAME", "u"), ("168_32_25_1_5000_PASSWORD", "p")], "u:p"),
        // Without a port such a name may mean something else: only for registries that the settings name.
        ("h.test", false, &[("H_TEST_USERNAME", "u"), ("H_TEST_PASSWORD", "p")], "file:1"),
        ("h.test", true, &[("H_TEST_USERNAME", "u"), ("H_TEST_PASSWORD", "p")], "u:p"),
        ("h.test:5000", false, &[("H_TEST_5000_USERNAME", "u")], "file:2"),
        (
            "h.test:5000",
            false,
            &[
                ("H_TEST_5000_USERNAME", "m"),
                ("H_TEST_5000_PASSWORD", "m"),
                ("OVENBIRD_REGISTRY_H_TEST_5000_USERNAME", "u"),
                ("OVENBIRD_REGISTRY_H_TEST_5000_PASSWORD", "p"),
            ],
            "u:p",
        ),
        (
            "h.test",
            false,
            &[("OVENBIRD_REGISTRY_H_TEST_USERNAME", "u"), ("OVENBIRD_REGISTRY_H_TEST_PASSWORD", "")],
            "error OVENBIRD_REGISTRY_H_TEST_USERNAME is set and OVENBIRD_REGISTRY_H_TEST_PASSWORD is not, so nobody can log in to h.test",
        ),
        (
            "h.test",
            false,
            &[("OVENBIRD_REGISTRY_H_TEST_PASSWORD", "p")],
            "error OVENBIRD_REGISTRY_H_TEST_PASSWORD is set and OVENBIRD_REGISTRY_H_TEST_USERNAME is not, so nobody can log in to h.test",
        ),
        ("h.test", false, &[], "file:1"),
    ] {
        let options = KeychainOptions {
            docker_config: Some(temp.path().join("docker")),
            variables: variables(pairs),
            named: named.then(|| registry.to_owned()).into_iter().collect(),
            ..KeychainOptions::default()
        };
        assert_eq!(show(Keychain::new(options).get(registry, "a").await), expected, "{registry} {pairs:?}");
    }
    assert_eq!(format!("{:?}", variables(&[("A_PASSWORD", "hunter2"), ("A_TOKEN", "x")])), "{\"A_PASSWORD\"}");
}

#[tokio::test]
async fn the_source_of_the_settings_is_the_only_one() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    helper(dir, "good", r#"read key; printf '{"Username":"%s","Secret":"good"}' "$key""#);
    helper(dir, "empty", r#"cat >/dev/null; echo "credentials not found in native keychain"; exit 1"#);
    write(&dir.join("docker/config.json"), &auths(&[("h.test", "file:1")]));
    write(&dir.join("secret/.dockerconfigjson"), &auths(&[("h.test", "pod:2")]));
    write(
        &dir.join("old/.dockercfg"),
        r#"{"h.test":{"auth":"b2xkOjM=","email":"x"},"https://g.test/v1/":{"username":"g","password":"4"}}"#,
    );
    write(&dir.join("password"), "from-file\r\n");
    write(&dir.join("nothing"), "\n");
    let path = |name: &str| dir.join(name);
    let word = Secret::new("from-variable");
    let variable = |password| Source::PasswordVariable { username: "me".into(), variable: "V".into(), password };
    for (source, expected) in [
        (Source::Anonymous, "none"),
        (Source::Files, "file:1"),
        (Source::File(path("secret")), "pod:2"),
        (Source::File(path("secret/.dockerconfigjson")), "pod:2"),
        (Source::File(path("old")), "old:3"),
        (Source::Helper("good".into()), "h.test:good"),
        (Source::PasswordFile { username: "me".into(), path: path("password") }, "me:from-file"),
        (variable(Some(word)), "me:from-variable"),
        (Source::Variables, "error the settings say that the credentials of h.test come from environment variables, which has none"),
        (variable(None), "error the settings say that the credentials of h.test come from the environment variable V, which has none"),
        (
            Source::Helper("empty".into()),
            "error the settings say that the credentials of h.test come from docker-credential-empty, which has none",
        ),
        (Source::File(path("absent")), "error cannot read DIR/absent: entity not found"),
        (
            Source::PasswordFile { username: "me".into(), path: path("nothing") },
            "error DIR/nothing is not a file with a secret: it is empty",
        ),
        (
            Source::PasswordFile { username: "me".into(), path: path("absent") },
            "error cannot read DIR/absent: No such file or directory (os error 2)",
        ),
        (Source::Helper("../x".into()), "error the settings names the credential helper \"../x\", which is not a plain program name"),
    ] {
        let options = KeychainOptions {
            docker_config: Some(path("docker")),
            sources: [("h.test".to_owned(), source.clone())].into(),
            ..KeychainOptions::default()
        };
        let keychain = Keychain::new(options).with_search_path(dir.join("bin").into());
        let got = show(keychain.get("h.test", "a").await).replace(dir.to_str().unwrap(), "DIR");
        assert_eq!(got, expected, "{source:?}");
        if !matches!(source, Source::Helper(_)) && !expected.starts_with("error") && expected != "none" {
            assert_eq!(show(Ok(keychain.recorded("h.test", "a"))), expected, "{source:?}");
        }
    }
}

#[tokio::test]
async fn mounted_pull_secrets_come_after_the_files_of_the_user() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    write(&dir.join("secret/.dockerconfigjson"), &auths(&[("h.test", "pod:2"), ("g.test", "pod:3")]));
    write(&dir.join("old/.dockercfg"), r#"{"f.test":{"auth":"b2xkOjM="}}"#);
    write(&dir.join("auth.json"), &auths(&[("h.test", "podman:1")]));
    let options = |docker: &str| KeychainOptions {
        docker_config: Some(dir.join(docker)),
        auth_file: Some(dir.join("auth.json")),
        auth_files: vec![dir.join("secret"), dir.join("old/.dockercfg"), dir.join("absent")],
        ..KeychainOptions::default()
    };
    for (docker, registry, expected, key) in [
        ("docker", "h.test", "podman:1", "auth.json"),
        ("docker", "g.test", "pod:3", ".dockerconfigjson"),
        ("docker", "f.test", "old:3", ".dockercfg"),
        ("docker", "e.test", "none", ""),
        // DOCKER_CONFIG on the folder of a mounted secret.
        ("secret", "h.test", "pod:2", ".dockerconfigjson"),
        ("old", "f.test", "old:3", ".dockercfg"),
    ] {
        let keychain = Keychain::new(options(docker));
        assert_eq!(show(keychain.get(registry, "a").await), expected, "{docker} {registry}");
        let found = keychain.find(Query { registry, repository: "a", address: None, refused: None }).await.unwrap();
        let place = found.map_or_else(String::new, |found| found.origin.to_string());
        assert!(place.contains(key), "{place}");
    }
    // They are others' files: only read.
    let keychain = Keychain::new(options("docker"));
    assert_eq!(keychain.erase("g.test").await.unwrap(), []);
    assert_eq!(keychain.store("g.test", "me", &Secret::new("5")).await.unwrap(), Kept::File(dir.join("docker/config.json")));
    // A login where DOCKER_CONFIG has the older form keeps that.
    assert_eq!(
        Keychain::new(options("old")).store("h.test", "me", &Secret::new("6")).await.unwrap(),
        Kept::File(dir.join("old/.dockercfg"))
    );
    let old = std::fs::read_to_string(dir.join("old/.dockercfg")).unwrap();
    assert!(!old.contains("auths") && old.contains("f.test") && old.contains("h.test"), "{old}");
    write(&dir.join("secret/.dockerconfigjson"), "broken");
    std::fs::remove_file(dir.join("docker/config.json")).unwrap();
    let error = Keychain::new(options("docker")).get("g.test", "a").await.unwrap_err().to_string();
    assert!(error.contains("secret/.dockerconfigjson is not a Docker configuration file"), "{error}");
}
