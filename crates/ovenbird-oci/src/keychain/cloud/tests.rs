//! Exchanges against a server in this process that checks every request as the vendor's documents describe it: there is no
//! such service to test against. Amazon's is tested against moto, with the command.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{KeyPair, RSA_PKCS1_2048_8192_SHA256, RsaKeyPair, UnparsedPublicKey};
use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use super::super::{Credential, Keychain, Secret};
use super::*;

const SECRET: &str = "hunter2-never-shown";

#[test]
fn hosts_and_their_clouds() {
    for (host, expected) in [
        ("123456789012.dkr.ecr.eu-west-1.amazonaws.com", "ecr 123456789012 eu-west-1"),
        ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "ecr 123456789012 cn-north-1"),
        ("123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com", "ecr 123456789012 us-gov-west-1"),
        ("123456789012.dkr-ecr.us-east-1.on.aws", "ecr 123456789012 us-east-1"),
        ("public.ecr.aws", "ecr public us-east-1"),
        ("1234.dkr.ecr.eu-west-1.amazonaws.com", ""),
        ("123456789012.dkr.ecr.eu-west-1.amazonaws.com.evil.test", ""),
        ("123456789012.dkr.ecr.evil.test/.amazonaws.com", ""),
        ("123456789012.dkr.ecr.eu-west-1.amazonaws.com:5000", ""),
        ("gcr.io", "google"),
        ("eu.gcr.io", "google"),
        ("europe-docker.pkg.dev", "google"),
        ("evilgcr.io", ""),
        ("gcr.io.evil.test", ""),
        ("pkg.dev.evil.test", ""),
        ("me.azurecr.io", "azure"),
        ("me.azurecr.cn", "azure"),
        ("azurecr.io", ""),
        ("a.b/.azurecr.io", ""),
        ("me.azurecr.io.evil.test", ""),
        ("ghcr.io", "github"),
        ("x.ghcr.io", ""),
        ("image-registry.openshift-image-registry.svc:5000", "openshift"),
        ("image-registry.openshift-image-registry.svc.evil.test:5000", ""),
        ("quay.io", ""),
    ] {
        let got = match EcrHost::parse(host) {
            Some(ecr) => format!("ecr {} {}", ecr.account.unwrap_or("public"), ecr.region),
            None if google::is_host(host) => "google".into(),
            None if azure::is_host(host) => "azure".into(),
            None if github::is_host(host) => "github".into(),
            None if openshift::is_host(host) => "openshift".into(),
            None => String::new(),
        };
        assert_eq!(got, expected, "{host}");
    }
}

/// What a server was asked.
struct Asked {
    line: String,
    head: String,
    form: HashMap<String, String>,
}

/// Answers every request: status, headers, JSON.
fn serve(answer: impl Fn(&Asked) -> Result<(String, Value), String> + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            std::thread::spawn(move || {
                let Some(asked) = read(&mut stream) else { return };
                let (status, headers, body) = match answer(&asked) {
                    Ok((headers, value)) => (200, headers, value.to_string()),
                    // As a service that says back what it was given.
                    Err(why) => (400, String::new(), json!({ "error": "invalid", "error_description": why }).to_string()),
                };
                let _ = write!(stream, "HTTP/1.1 {status} X\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
            });
        }
    });
    format!("http://{address}")
}

fn read(stream: &mut TcpStream) -> Option<Asked> {
    let mut head = vec![];
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).ok()?;
    let length = head.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    let url = reqwest::Url::parse(&format!("http://x/?{}", String::from_utf8(body).ok()?)).ok()?;
    let form = url.query_pairs().map(|(k, v)| (k.into(), v.into())).collect();
    Some(Asked { line: head.lines().next()?.into(), head: head.to_ascii_lowercase(), form })
}

impl Asked {
    fn want(&self, name: &str, expected: &str) -> Result<(), String> {
        match self.form.get(name) {
            Some(got) if got == expected => Ok(()),
            got => Err(format!("{name} is {got:?}, which is wrong; all: {:?}", self.form)),
        }
    }
}

fn query<'a>(registry: &'a str, address: Option<&'a str>, refused: Option<&'a Credential>) -> Query<'a> {
    Query { registry, repository: "team/app", address, refused }
}

fn password(found: Option<Found>) -> (String, String) {
    match found.unwrap().credential {
        Credential::Password { username, password } => (username, password.expose().into()),
        Credential::IdentityToken(token) | Credential::RegistryToken(token) => (String::new(), token.expose().into()),
    }
}

/// A key file of a service account, its public key, and its text.
fn service_account(dir: &std::path::Path, token_uri: &str) -> (std::path::PathBuf, Vec<u8>) {
    let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
    let der: aws_lc_rs::encoding::Pkcs8V1Der<'_> = pair.as_der().unwrap();
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", BASE64_STANDARD.encode(der.as_ref()));
    let key = json!({
        "type": "service_account", "project_id": "p", "private_key_id": "key-1", "private_key": pem,
        "client_email": "builder@p.iam.gserviceaccount.com", "client_id": "1", "token_uri": token_uri,
    });
    let path = dir.join("key.json");
    std::fs::write(&path, key.to_string()).unwrap();
    (path, pair.public_key().as_ref().to_vec())
}

/// RFC 7523 and Google's "Using OAuth 2.0 for Server to Server Applications": the assertion is an RS256 JWT by the account's key,
/// for the token service, of at most an hour.
fn check_assertion(asked: &Asked, public: &[u8], audience: &str) -> Result<(), String> {
    asked.want("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer")?;
    let assertion = asked.form.get("assertion").ok_or("no assertion")?;
    let [header, claims, signature] = assertion.split('.').collect::<Vec<_>>().try_into().map_err(|_| "no JWT")?;
    let decode = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|e| e.to_string());
    UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, public)
        .verify(format!("{header}.{claims}").as_bytes(), &decode(signature)?)
        .map_err(|_| "the signature is wrong")?;
    let header: Value = serde_json::from_slice(&decode(header)?).map_err(|e| e.to_string())?;
    let claims: Value = serde_json::from_slice(&decode(claims)?).map_err(|e| e.to_string())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let fits = header == json!({ "alg": "RS256", "typ": "JWT", "kid": "key-1" })
        && claims["iss"] == "builder@p.iam.gserviceaccount.com"
        && claims["scope"] == "https://www.googleapis.com/auth/cloud-platform"
        && claims["aud"] == audience
        && claims["iat"].as_u64().is_some_and(|iat| iat.abs_diff(now) < 30)
        && claims["exp"].as_u64() == claims["iat"].as_u64().map(|iat| iat + 3600);
    if fits { Ok(()) } else { Err(format!("{header} {claims}")) }
}

#[tokio::test]
async fn google_service_account_once_for_all_and_again_when_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let public = Arc::new(Mutex::new(vec![]));
    let count = Arc::new(AtomicUsize::new(0));
    let (known, counted) = (Arc::clone(&public), Arc::clone(&count));
    let address = Arc::new(Mutex::new(String::new()));
    let own = Arc::clone(&address);
    let url = serve(move |asked| {
        check_assertion(asked, &known.lock().unwrap(), &own.lock().unwrap())?;
        let number = counted.fetch_add(1, Ordering::SeqCst) + 1;
        Ok((String::new(), json!({ "access_token": format!("ya29.{number}"), "expires_in": 2, "token_type": "Bearer" })))
    });
    let token_uri = format!("{url}/token");
    address.lock().unwrap().clone_from(&token_uri);
    let (path, key) = service_account(dir.path(), &token_uri);
    *public.lock().unwrap() = key;
    let options =
        KeychainOptions { google: GoogleOptions { key_file: Some(path), ..GoogleOptions::default() }, ..KeychainOptions::default() };
    let keychain = Keychain::new(options);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let keychain = keychain.clone();
        tasks.spawn(async move { password(keychain.find(query("europe-docker.pkg.dev", None, None)).await.unwrap()) });
    }
    while let Some(done) = tasks.join_next().await {
        assert_eq!(done.unwrap(), ("oauth2accesstoken".into(), "ya29.1".into()));
    }
    // Refused: again, once for all who were refused together.
    let first = keychain.find(query("europe-docker.pkg.dev", None, None)).await.unwrap().unwrap();
    for _ in 0..3 {
        let found = keychain.find(query("europe-docker.pkg.dev", None, Some(&first.credential))).await.unwrap();
        assert_eq!(password(found).1, "ya29.2");
    }
    // It ends by the clock.
    tokio::time::sleep(Duration::from_millis(1700)).await;
    let found = keychain.find(query("europe-docker.pkg.dev", None, None)).await.unwrap().unwrap();
    assert!(found.expires.is_some() && found.origin.to_string().contains("service account builder@p"), "{found:?}");
    assert_eq!((password(Some(found)).1.as_str(), count.load(Ordering::SeqCst)), ("ya29.3", 3));
}

#[tokio::test]
async fn google_user_metadata_and_refusals() {
    let dir = tempfile::tempdir().unwrap();
    let url = serve(|asked| {
        if asked.line.starts_with("GET /computeMetadata/v1/instance/service-accounts/default/token") {
            // Google's "VM metadata": requests without this header are refused, answers have it, too.
            let has = asked.head.contains("metadata-flavor: google\r\n");
            return if has {
                Ok(("Metadata-Flavor: Google\r\n".into(), json!({ "access_token": "ya29.vm", "expires_in": 3599 })))
            } else {
                Err("no header".into())
            };
        }
        asked.want("grant_type", "refresh_token")?;
        asked.want("client_id", "id")?;
        asked.want("client_secret", SECRET)?;
        asked.want("refresh_token", "1//refresh")?;
        Ok((String::new(), json!({ "access_token": "ya29.user" })))
    });
    let write = |name: &str, key: &Value| {
        let path = dir.path().join(name);
        std::fs::write(&path, key.to_string()).unwrap();
        Some(path)
    };
    let user = |refresh: &str| json!({ "type": "authorized_user", "client_id": "id", "client_secret": SECRET, "refresh_token": refresh });
    let options = |key_file, well_known_file| GoogleOptions {
        key_file,
        well_known_file,
        token_endpoint: Some(format!("{url}/token")),
        metadata_host: Some(url.trim_start_matches("http://").into()),
    };
    let foreign = serve(|_| Ok((String::new(), json!({ "access_token": "evil" }))));
    let elsewhere = GoogleOptions { metadata_host: Some(foreign.trim_start_matches("http://").into()), ..GoogleOptions::default() };
    let plain = GoogleOptions { token_endpoint: Some("http://token.test/".into()), ..options(write("plain", &user("x")), None) };
    for (options, expected) in [
        (options(write("user", &user("1//refresh")), None), "oauth2accesstoken ya29.user"),
        (options(None, write("gcloud", &user("1//refresh"))), "oauth2accesstoken ya29.user"),
        (options(None, Some(dir.path().join("absent"))), "oauth2accesstoken ya29.vm"),
        (options(Some(dir.path().join("absent")), None), "cannot read DIR/absent: No such file or directory"),
        (
            options(write("wrong", &user("2//other")), None),
            "Google: cannot exchange DIR/wrong for a token: 400 Bad Request: refresh_token is Some(\"***\")",
        ),
        (
            options(write("wif", &json!({ "type": "external_account" })), None),
            "DIR/wif is not a key file of Google: keys of type \"external_account\" are not supported",
        ),
        (options(write("none", &json!({})), None), "DIR/none is not a key file of Google: it has no \"type\""),
        (
            options(write("bad", &json!({ "type": "service_account", "client_email": "a", "private_key": SECRET })), None),
            "its private_key is no PKCS #8 PEM",
        ),
        (plain, "is not reached over HTTPS"),
        // Something else that answers at that address.
        (elsewhere, "nobody"),
    ] {
        let keychain = Keychain::new(KeychainOptions { google: options.clone(), ..KeychainOptions::default() });
        let got = match keychain.find(query("gcr.io", None, None)).await {
            Ok(None) => "nobody".into(),
            Ok(found) => {
                let (user, secret) = password(found);
                format!("{user} {secret}")
            }
            Err(error) => error.to_string().replace(dir.path().to_str().unwrap(), "DIR"),
        };
        assert!(got.contains(expected) && !got.contains(SECRET), "{options:?}: {got}");
    }
}

#[tokio::test]
async fn azure_exchanges_a_directory_token_at_the_registry() {
    let dir = tempfile::tempdir().unwrap();
    let federated = dir.path().join("federated");
    std::fs::write(&federated, "federated-jwt\n").unwrap();
    let exp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 10_800;
    let refresh = format!("h.{}.s", BASE64_URL_SAFE_NO_PAD.encode(json!({ "exp": exp }).to_string()));
    let given = refresh.clone();
    let url = serve(move |asked| {
        let path = asked.line.split(' ').nth(1).unwrap_or_default();
        if path == "/tenant-1/oauth2/v2.0/token" {
            // Microsoft's "OAuth 2.0 client credentials flow": first case with a shared secret, third case with a federated credential.
            asked.want("grant_type", "client_credentials")?;
            asked.want("scope", "https://containerregistry.azure.net/.default")?;
            asked.want("client_id", "client-1")?;
            if asked.form.contains_key("client_assertion") {
                asked.want("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer")?;
                asked.want("client_assertion", "federated-jwt")?;
            } else {
                asked.want("client_secret", SECRET)?;
            }
            return Ok((String::new(), json!({ "access_token": "aad", "expires_in": 3599 })));
        }
        if path.starts_with("/metadata/identity/oauth2/token?") {
            // "Managed identities: acquire a token": the header guards against requests that were tricked out of somebody.
            let fits = asked.head.contains("metadata: true\r\n")
                && path.contains("api-version=2018-02-01")
                && path.contains("&resource=https://containerregistry.azure.net/");
            return if fits { Ok((String::new(), json!({ "access_token": "aad", "expires_in": "3599" }))) } else { Err(path.to_owned()) };
        }
        // Azure/acr, AAD-OAuth.md: POST /oauth2/exchange of the registry itself.
        if path != "/oauth2/exchange" {
            return Err(format!("nothing at {path}"));
        }
        asked.want("grant_type", "access_token")?;
        asked.want("service", "me.azurecr.io")?;
        asked.want("access_token", "aad")?;
        Ok((String::new(), json!({ "refresh_token": given })))
    });
    let base = AzureOptions {
        tenant: Some("tenant-1".into()),
        client_id: Some("client-1".into()),
        authority: Some(format!("{url}/")),
        metadata_endpoint: Some(url.clone()),
        ..AzureOptions::default()
    };
    let secret = AzureOptions { client_secret: Some(Secret::new(SECRET)), ..base.clone() };
    for (options, expected) in [
        (secret.clone(), "Azure, client client-1 with its secret"),
        (AzureOptions { federated_token_file: Some(federated), ..base.clone() }, "Azure, client client-1 with a federated token"),
        (base.clone(), "Azure, managed identity client-1"),
        (AzureOptions { tenant: None, client_id: None, ..base.clone() }, "Azure, managed identity"),
        (
            AzureOptions { client_id: Some("other".into()), ..secret.clone() },
            "! Azure: cannot log in as client other with its secret: 400 Bad Request: client_id is",
        ),
        (
            AzureOptions { client_secret: Some(Secret::new(format!("{SECRET}-2"))), ..base.clone() },
            "! Azure: cannot log in as client client-1 with its secret: 400",
        ),
        (AzureOptions { tenant: Some("nobody".into()), ..secret.clone() }, "nothing at /nobody/oauth2/v2.0/token"),
        (AzureOptions { federated_token_file: Some(dir.path().join("absent")), ..base.clone() }, "! cannot read"),
    ] {
        let keychain = Keychain::new(KeychainOptions { azure: options, ..KeychainOptions::default() });
        let got = match keychain.find(query("me.azurecr.io", Some(&url), None)).await {
            Ok(Some(found)) => {
                assert_eq!(found.credential, Credential::IdentityToken(Secret::new(refresh.as_str())));
                assert_eq!(found.expires, Some(UNIX_EPOCH + Duration::from_secs(exp)));
                found.origin.to_string()
            }
            other => format!("! {}", other.map(|_| "nobody").unwrap_err()),
        };
        assert!(got.contains(expected) && !got.contains("aad") && !got.contains(SECRET), "{expected}: {got}");
    }
}

#[tokio::test]
async fn github_and_openshift() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "sha256~one\n").unwrap();
    let token = Some(("GITHUB_TOKEN".to_owned(), Secret::new("ghs_1")));
    let options = KeychainOptions {
        github: GithubOptions { token, actor: Some("anna".into()) },
        openshift: OpenshiftOptions { token_file: Some(file.clone()) },
        ..KeychainOptions::default()
    };
    let keychain = Keychain::new(options);
    let internal = "image-registry.openshift-image-registry.svc:5000";
    assert_eq!(password(keychain.find(query("ghcr.io", None, None)).await.unwrap()), ("anna".into(), "ghs_1".into()));
    assert_eq!(password(keychain.find(query(internal, None, None)).await.unwrap()), ("serviceaccount".into(), "sha256~one".into()));
    // The kubelet renews it in its place.
    std::fs::write(&file, "sha256~two\n").unwrap();
    assert_eq!(password(keychain.find(query(internal, None, None)).await.unwrap()).1, "sha256~two");
    std::fs::remove_file(&file).unwrap();
    let error = keychain.find(query(internal, None, None)).await.unwrap_err().to_string();
    assert!(error.contains("cannot read") && error.contains("token"), "{error}");
    // Nobody's: none.
    assert_eq!(Keychain::default().find(query("ghcr.io", None, None)).await.unwrap(), None);
}
