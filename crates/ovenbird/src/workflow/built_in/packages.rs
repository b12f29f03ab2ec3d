//! Packages of an image, read from the files of their package managers, and documents about them.

use std::path::Path;

use ovenbird_oci::Platform;
use serde::Serialize;
use serde_json::{Value, json};

use crate::builder::Image;
use crate::error::Error;
use crate::request::Network;
use crate::workflow::Scene;
use crate::workflow::inside::read_entry;

/// Largest file of a package manager.
const MOST_BYTES: u64 = 256 << 20;
/// Largest file of one Python package.
const MOST_METADATA: u64 = 4 << 20;
/// Most packages.
const MOST_PACKAGES: usize = 200_000;

/// One package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Package {
    /// `deb`, `apk`, `rpm` or `pypi`, as in a purl.
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) name: String,
    pub(super) version: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) architecture: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) license: String,
}

/// The packages of an image of one platform, sorted.
pub(super) fn list(scene: &Scene, image: &Image, platform: &Platform) -> Result<Vec<Package>, Error> {
    let mut found = vec![];
    let mut has_rpm = false;
    scene.files(image, &mut |path, entry| {
        let Some(name) = path.to_str() else { return Ok(()) };
        if matches!(Path::new(name).parent().and_then(Path::to_str), Some("var/lib/rpm" | "usr/lib/sysimage/rpm")) {
            has_rpm = true;
        }
        if !entry.header().entry_type().is_file() || found.len() > MOST_PACKAGES {
            return Ok(());
        }
        let read =
            |entry: &mut tar::Entry<'_, std::fs::File>, most| read_entry(entry, most).map(|b| String::from_utf8_lossy(&b).into_owned());
        match name {
            "var/lib/dpkg/status" => found.extend(dpkg(&read(entry, MOST_BYTES)?)),
            "lib/apk/db/installed" | "usr/lib/apk/db/installed" => found.extend(apk(&read(entry, MOST_BYTES)?)),
            _ if name.starts_with("var/lib/dpkg/status.d/") && !name.ends_with(".md5sums") => {
                found.extend(dpkg(&read(entry, MOST_METADATA)?))
            }
            _ if name.ends_with(".dist-info/METADATA") || name.ends_with(".egg-info/PKG-INFO") => {
                found.extend(python(&read(entry, MOST_METADATA)?));
            }
            _ => {}
        }
        Ok(())
    })?;
    if has_rpm {
        // Its database is no text: the program in the image reads it.
        let format = r"%{NAME}\t%|EPOCH?{%{EPOCH}:}:{}|%{VERSION}-%{RELEASE}\t%{ARCH}\t%{LICENSE}\n";
        let command = ["rpm", "-qa", "--qf", format].map(str::to_owned);
        found.extend(rpm(&scene.run_in(image, platform, &command, Network::None)?));
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// `Key: value` of the lines of one paragraph; lines that go on are left out.
fn field<'a>(paragraph: &'a str, key: &str) -> &'a str {
    let line = paragraph.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.map(str::trim).unwrap_or_default()
}

fn dpkg(text: &str) -> Vec<Package> {
    let paragraphs = text.split("\n\n").filter(|paragraph| {
        let status = field(paragraph, "Status");
        // Files of images without dpkg have no status.
        !field(paragraph, "Package").is_empty() && (status.is_empty() || status.ends_with(" installed"))
    });
    let packages = paragraphs.map(|paragraph| Package {
        kind: "deb",
        name: field(paragraph, "Package").into(),
        version: field(paragraph, "Version").into(),
        architecture: field(paragraph, "Architecture").into(),
        license: String::new(),
    });
    packages.collect()
}

fn apk(text: &str) -> Vec<Package> {
    let packages = text.split("\n\n").filter(|paragraph| !field(paragraph, "P").is_empty()).map(|paragraph| Package {
        kind: "apk",
        name: field(paragraph, "P").into(),
        version: field(paragraph, "V").into(),
        architecture: field(paragraph, "A").into(),
        license: field(paragraph, "L").into(),
    });
    packages.collect()
}

fn rpm(text: &str) -> Vec<Package> {
    let packages = text.lines().filter_map(|line| {
        let mut fields = line.split('\t');
        let (name, version, architecture, license) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let own = |text: &str| if text == "(none)" { String::new() } else { text.to_owned() };
        Some(Package { kind: "rpm", name: name.into(), version: version.into(), architecture: own(architecture), license: own(license) })
    });
    packages.collect()
}

fn python(text: &str) -> Option<Package> {
    let head = text.split("\n\n").next().unwrap_or_default();
    let name = field(head, "Name");
    let license = [field(head, "License-Expression"), field(head, "License")].into_iter().find(|said| !said.is_empty()).unwrap_or_default();
    (!name.is_empty()).then(|| Package {
        kind: "pypi",
        // As the index compares names.
        name: name.to_ascii_lowercase().replace(['_', '.'], "-"),
        version: field(head, "Version").into(),
        architecture: String::new(),
        license: license.into(),
    })
}

/// What a document is about.
pub(super) struct Subject<'a> {
    pub(super) name: &'a str,
    pub(super) digest: &'a str,
    /// Seconds since 1970.
    pub(super) time: i64,
}

impl Subject<'_> {
    fn created(&self) -> String {
        jiff::Timestamp::from_second(self.time).unwrap_or_default().to_string()
    }
}

fn purl(package: &Package) -> String {
    let coded = |text: &str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
        text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect::<String>()
    };
    let architecture = if package.architecture.is_empty() { String::new() } else { format!("?arch={}", coded(&package.architecture)) };
    let space = match package.kind {
        "deb" => "debian/",
        "apk" => "alpine/",
        _ => "",
    };
    format!("pkg:{}/{space}{}@{}{architecture}", package.kind, coded(&package.name), coded(&package.version))
}

/// SPDX 2.3.
pub(super) fn spdx(subject: &Subject, packages: &[Package]) -> Value {
    let id = |number: usize| format!("SPDXRef-Package-{number}");
    let listed: Vec<Value> = packages
        .iter()
        .enumerate()
        .map(|(number, package)| {
            json!({
                "SPDXID": id(number), "name": package.name, "versionInfo": package.version, "downloadLocation": "NOASSERTION",
                "filesAnalyzed": false, "licenseConcluded": "NOASSERTION", "licenseDeclared": "NOASSERTION",
                "licenseComments": package.license, "copyrightText": "NOASSERTION",
                "externalRefs": [{ "referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl(package) }],
            })
        })
        .collect();
    let relations: Vec<Value> = (0..packages.len())
        .map(|number| json!({ "spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": id(number) }))
        .collect();
    json!({
        "spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT", "name": subject.name,
        "documentNamespace": format!("urn:ovenbird:{}", subject.digest),
        "creationInfo": { "created": subject.created(), "creators": [concat!("Tool: ovenbird-", env!("CARGO_PKG_VERSION"))] },
        "packages": listed, "relationships": relations,
    })
}

/// CycloneDX 1.5.
pub(super) fn cyclonedx(subject: &Subject, packages: &[Package]) -> Value {
    let components: Vec<Value> = packages
        .iter()
        .map(|package| {
            let purl = purl(package);
            let mut component =
                json!({ "type": "library", "bom-ref": purl, "name": package.name, "version": package.version, "purl": purl });
            if !package.license.is_empty() {
                component["licenses"] = json!([{ "license": { "name": package.license } }]);
            }
            component
        })
        .collect();
    json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {
            "timestamp": subject.created(),
            "tools": { "components": [{ "type": "application", "name": "ovenbird", "version": env!("CARGO_PKG_VERSION") }] },
            "component": { "type": "container", "name": subject.name, "version": subject.digest },
        },
        "components": components,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(packages: impl IntoIterator<Item = Package>) -> Vec<String> {
        packages.into_iter().map(|p| format!("{} {} {} {} {}", p.kind, p.name, p.version, p.architecture, p.license)).collect()
    }

    #[test]
    fn package_managers() {
        let status = "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nDescription: x\n Version: no\nVersion: 2.36-9\n\nPackage: gone\nStatus: deinstall ok config-files\nVersion: 1\n";
        assert_eq!(told(dpkg(status)), ["deb libc6 2.36-9 amd64 "]);
        assert_eq!(told(apk("C:Q1\nP:musl\nV:1.2.5-r0\nA:x86_64\nL:MIT\nF:lib\n\n")), ["apk musl 1.2.5-r0 x86_64 MIT"]);
        assert_eq!(told(rpm("bash\t5.2-1\tx86_64\tGPL\nbroken\n")), ["rpm bash 5.2-1 x86_64 GPL"]);
        assert_eq!(told(python("Name: My_Pkg\nVersion: 1.0\nLicense: MIT\n\nName: not")), ["pypi my-pkg 1.0  MIT"]);
        assert!(python("Version: 1").is_none());
    }

    #[test]
    fn documents() {
        let package =
            Package { kind: "deb", name: "g++".into(), version: "4:12.2".into(), architecture: "amd64".into(), license: String::new() };
        assert_eq!(purl(&package), "pkg:deb/debian/g%2B%2B@4%3A12.2?arch=amd64");
        let subject = Subject { name: "a:1", digest: "sha256:0", time: 0 };
        let spdx = spdx(&subject, std::slice::from_ref(&package));
        assert_eq!(spdx["creationInfo"]["created"], "1970-01-01T00:00:00Z");
        assert_eq!(spdx["packages"][0]["name"], "g++");
        assert_eq!(cyclonedx(&subject, &[package])["components"][0]["purl"], "pkg:deb/debian/g%2B%2B@4%3A12.2?arch=amd64");
    }
}
