//! The leak gate: no image is made that holds a secret of its own build.
//!
//! Every way out of a build (a name, a push, an archive, a folder) begins with the image, so the gate stands before it: what the steps
//! added and the config and annotations are searched for the secrets that were given, for the passwords in the addresses of its sources, and
//! for the credentials of the registries that the build talks to. Layers are searched while they are packed. What was searched for in a layer is remembered by keyed hashes, so that
//! a layer from the cache is read again only for a secret that is new. The base image is not searched: it is out already.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;

use aws_lc_rs::hmac;
use ovenbird_oci::layer::{Found, Needles};
use ovenbird_oci::registry::Client;
use ovenbird_oci::{Digest, Reference};
use serde_json::Value;

use crate::error::BuildError;
use crate::input::{BuildInput, SecretSource};
use crate::state::{SnapshotId, State};

/// Shorter ones are in any layer by chance.
const SHORTEST: usize = 8;
/// Longer ones are looked for by their beginning.
const LONGEST: usize = 64 * 1024;
/// Least length of a line of a private key that is looked for by itself.
const KEY_LINE: usize = 48;

/// What a finding is called, and the name that `--allow-leak` knows it by.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Owner {
    what: String,
    id: String,
}

/// What one build must not let out.
#[derive(Debug, Default)]
pub struct Gate {
    owners: Vec<Owner>,
    bytes: Vec<Vec<u8>>,
    /// Keyed hashes of `bytes`.
    marks: Vec<String>,
    needles: Needles,
}

impl Gate {
    /// The gate of a build that takes base images from `bases`.
    pub fn new(state: &State, client: &Client, input: &BuildInput, bases: &[&Reference]) -> Result<Self, BuildError> {
        let mut found: Vec<(Owner, Vec<u8>)> = vec![];
        for (id, source) in &input.secrets {
            let owner = Owner { what: format!("the secret {id:?}"), id: id.clone() };
            found.extend(forms(&content(source)).into_iter().map(|bytes| (owner.clone(), bytes)));
        }
        let mut registries = BTreeSet::new();
        for reference in bases.iter().copied().chain(&input.publish_to) {
            registries.insert(reference.registry().to_owned());
            let Some(credential) = client.recorded_credential(reference) else { continue };
            let id = reference.registry().to_owned();
            let owner = Owner { what: format!("the password or token for the registry {id}"), id };
            found.extend(credential.forms().into_iter().filter(|f| f.len() >= SHORTEST).map(|bytes| (owner.clone(), bytes)));
        }
        for (host, login) in &input.logins {
            let owner = Owner { what: format!("the password in the address of the source at {host}"), id: host.clone() };
            found.extend(login.forms().into_iter().filter(|f| f.len() >= SHORTEST).map(|bytes| (owner.clone(), bytes)));
        }
        let is_known = |id: &String| input.secrets.contains_key(id) || registries.contains(id) || input.logins.contains_key(id);
        if let Some(unknown) = input.allow_leak.iter().find(|id| !is_known(id)) {
            return Err(BuildError::Refused {
                option: format!("--allow-leak {unknown}"),
                reason: "no --secret of this build, registry it talks to or host with a password in the address of a source has that name"
                    .into(),
            });
        }
        found.retain(|(owner, _)| !input.allow_leak.contains(&owner.id));
        let mut seen = BTreeSet::new();
        found.retain(|(_, bytes)| seen.insert(bytes.clone()));
        if found.is_empty() {
            return Ok(Self::default());
        }
        let key = hmac::Key::new(hmac::HMAC_SHA256, &state.leak_key()?);
        let (owners, bytes): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        let marks = bytes.iter().map(|b| hex(hmac::sign(&key, b).as_ref())).collect();
        let needles = Needles::new(bytes.iter().map(Vec::as_slice));
        Ok(Self { owners, bytes, marks, needles })
    }

    /// Names of everything that is looked for: ids of secrets, and registries.
    pub fn names(&self) -> BTreeSet<String> {
        self.owners.iter().map(|owner| owner.id.clone()).collect()
    }

    /// What to look for while a layer is packed.
    pub fn needles(&self) -> &Needles {
        &self.needles
    }

    /// What a snapshot was not searched for yet, with the places of the needles in this gate; `None`: it was for all.
    pub fn unsearched(&self, state: &State, id: &SnapshotId) -> Option<(Needles, Vec<usize>)> {
        if self.marks.is_empty() {
            return None;
        }
        let known = state.searched(id);
        let places: Vec<usize> = (0..self.marks.len()).filter(|at| !known.contains(&self.marks[*at])).collect();
        if places.is_empty() {
            return None;
        }
        Some((Needles::new(places.iter().map(|at| self.bytes[*at].as_slice())), places))
    }

    /// A snapshot was searched for everything: remembers it when nothing was found.
    pub fn passed(&self, state: &State, id: &SnapshotId) -> Result<(), BuildError> {
        if self.marks.is_empty() {
            return Ok(());
        }
        let mut known = state.searched(id);
        known.extend(self.marks.iter().cloned());
        Ok(state.set_searched(id, &known)?)
    }

    /// Refuses a layer in which something was found.
    pub fn check_layer(&self, layer: &Digest, found: &[Found]) -> Result<(), BuildError> {
        let Some(first) = found.first() else { return Ok(()) };
        let others: BTreeSet<&str> = found.iter().map(|f| self.owners[f.needle].id.as_str()).collect();
        // The path itself may hold what must not be shown.
        let path = match self.needles.find(&first.path) {
            Some(_) => "the name of a file".to_owned(),
            None => format!("/{}", String::from_utf8_lossy(&first.path).escape_debug()),
        };
        let more = if others.len() > 1 { format!(" (and {} more secrets)", others.len() - 1) } else { String::new() };
        let place = format!("{path} in the layer {layer}{more}");
        Err(self.refuse(first.needle, place))
    }

    /// Refuses a document in which something stands: every text and every name in it.
    pub fn check_document(&self, name: &str, document: &impl serde::Serialize) -> Result<(), BuildError> {
        if self.marks.is_empty() {
            return Ok(());
        }
        let value = serde_json::to_value(document).unwrap_or_default();
        let mut open: Vec<(String, &Value)> = vec![(name.to_owned(), &value)];
        while let Some((place, value)) = open.pop() {
            match value {
                Value::String(text) => {
                    if let Some(at) = self.needles.find(text.as_bytes()) {
                        return Err(self.refuse(at, place));
                    }
                }
                Value::Array(items) => open.extend(items.iter().enumerate().rev().map(|(i, item)| (format!("{place}[{i}]"), item))),
                Value::Object(fields) => {
                    for (field, item) in fields.iter().rev() {
                        // The name itself may be what must not be shown.
                        if let Some(at) = self.needles.find(field.as_bytes()) {
                            return Err(self.refuse(at, format!("a name in {place}")));
                        }
                        open.push((format!("{place}.{field}"), item));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn refuse(&self, needle: usize, place: String) -> BuildError {
        let Owner { what, id } = self.owners[needle].clone();
        BuildError::Leak { what, place, id }
    }
}

/// What is known of a secret without running a step: a file that cannot be read fails the step that needs it.
fn content(source: &SecretSource) -> Vec<u8> {
    match source {
        SecretSource::Value(value) => value.0.clone(),
        SecretSource::File(path) => {
            let mut bytes = vec![];
            let read = File::open(path).and_then(|file| file.take(LONGEST as u64).read_to_end(&mut bytes));
            if read.is_ok() { bytes } else { vec![] }
        }
    }
}

/// The bytes to look for: the secret without the blanks around it. Of a private key also single lines of its body, since a key is often
/// written again with other line ends; of its second half, where no public part stands.
fn forms(content: &[u8]) -> Vec<Vec<u8>> {
    let whole = content[..content.len().min(LONGEST)].trim_ascii();
    if whole.len() < SHORTEST {
        return vec![];
    }
    let mut forms = vec![whole.to_vec()];
    let text = String::from_utf8_lossy(whole);
    let begins = |line: &str| line.starts_with("-----BEGIN ") && line.ends_with("PRIVATE KEY-----");
    let mut body: Vec<&str> = vec![];
    for line in text.lines().map(str::trim).skip_while(|line| !begins(line)).chain(["-----END"]) {
        if line.starts_with("-----END") {
            let half = body.len() / 2;
            forms.extend(body.drain(..).skip(half).filter(|line| line.len() >= KEY_LINE).map(|line| line.as_bytes().to_vec()));
        } else if !line.starts_with("-----") {
            body.push(line);
        }
    }
    forms
}

/// Half of the hash is more than enough to tell secrets apart.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(16).fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use ovenbird_oci::registry::ClientOptions;

    use super::*;
    use crate::input::Secret;

    fn secret(text: &str) -> SecretSource {
        SecretSource::Value(Secret(text.into()))
    }

    #[test]
    fn what_is_looked_for() {
        let line = |c: char| c.to_string().repeat(64);
        let key = ['a', 'b', 'c', 'd'].map(line).join("\r\n");
        let key = format!("-----BEGIN RSA PRIVATE KEY-----\r\n{key}\r\nshort\r\n-----END RSA PRIVATE KEY-----\r\n");
        for (content, expect) in [
            ("", vec![]),
            ("short\n", vec![]),
            ("        \n", vec![]),
            ("a token\n", vec![]),
            ("the token\n", vec!["the token".to_owned()]),
            (&key, vec![key.trim().to_owned(), line('c'), line('d')]),
        ] {
            let got: Vec<_> = forms(content.as_bytes()).into_iter().map(|f| String::from_utf8(f).unwrap()).collect();
            assert_eq!(got, expect, "{content}");
        }
        assert_eq!(forms(&vec![b'x'; 2 * LONGEST])[0].len(), LONGEST);
    }

    #[test]
    fn findings_have_a_name_and_a_place_and_no_bytes() {
        let root = tempfile::tempdir().unwrap();
        let state = State::open(root.path(), None).unwrap();
        let docker = tempfile::tempdir().unwrap();
        // user:registry-pass
        let config = r#"{"auths":{"r.example:5000":{"auth":"dXNlcjpyZWdpc3RyeS1wYXNz"}}}"#;
        std::fs::write(docker.path().join("config.json"), config).unwrap();
        let client = Client::new(ClientOptions { docker_config: Some(docker.path().into()), ..ClientOptions::default() });
        let base: Reference = "r.example:5000/base:1".parse().unwrap();
        let gate = |allowed: &[&str], bases: &[&Reference]| {
            let secrets = [("token".to_owned(), secret("hunter2-hunter2\n")), ("pin".to_owned(), secret("1234"))];
            let allow_leak = allowed.iter().map(|a| (*a).to_owned()).collect();
            Gate::new(&state, &client, &BuildInput { secrets: secrets.into(), allow_leak, ..BuildInput::default() }, bases)
        };
        for (document, allowed, expect) in [
            (
                serde_json::json!({"config": {"Env": ["A=1", "B=hunter2-hunter2"]}}),
                &[][..],
                "the secret \"token\" is in the image: config.config.Env[1];",
            ),
            (serde_json::json!({"Labels": {"hunter2-hunter2": ""}}), &[], "the secret \"token\" is in the image: a name in config.Labels;"),
            (
                serde_json::json!({"history": [{"created_by": "RUN x registry-pass"}]}),
                &[],
                "the password or token for the registry r.example:5000 is in the image: config.history[0].created_by;",
            ),
            (serde_json::json!(["dXNlcjpyZWdpc3RyeS1wYXNz"]), &["token"], "the password or token"),
            (serde_json::json!(["registry-pass hunter2-hunter2"]), &["token", "r.example:5000"], ""),
            (serde_json::json!(["1234 hunter2"]), &[], ""),
        ] {
            let told =
                gate(allowed, &[&base]).unwrap().check_document("config", &document).map_or_else(|e| e.to_string(), |()| String::new());
            assert!(told.starts_with(expect) && told.is_empty() == expect.is_empty(), "{document}: {told}");
            assert!(!told.contains("hunter2") && !told.contains("registry-pass"), "{told}");
        }
        let found = [Found { needle: 0, path: b"etc/hunter2-hunter2".to_vec() }];
        let told = gate(&[], &[]).unwrap().check_layer(&Digest::of(b""), &found).unwrap_err().to_string();
        assert!(told.contains("the name of a file in the layer sha256:") && !told.contains("hunter2"), "{told}");
        assert!(gate(&["tokn"], &[]).unwrap_err().to_string().contains("--allow-leak tokn"));
        let key = std::fs::metadata(root.path().join("leak-key")).unwrap();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&key.permissions()) & 0o777, 0o600);
    }
}
