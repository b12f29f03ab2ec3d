//! Names that other builders took apart wrongly, in one table: 13 of ixian-docker (`parse_registry`), 6 of ICL (`Image.from_full_name`), 5 of
//! dock (`registry/image:tag`). Each is checked against its parts.

use ovenbird_oci::Reference;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

struct Name {
    /// Who got it wrong, or asked for it.
    of: &'static str,
    given: &'static str,
    registry: &'static str,
    repository: &'static str,
    tag: Option<&'static str>,
    digest: bool,
}

const fn name(of: &'static str, given: &'static str, registry: &'static str, repository: &'static str, tag: &'static str) -> Name {
    Name { of, given, registry, repository, tag: Some(tag), digest: false }
}

const NAMES: [Name; 24] = [
    // Names without a registry are of Docker Hub; one with a dot, a port, or `localhost` names it. ixian wanted a dot and no port.
    name("ixian 1", "app", "docker.io", "library/app", "latest"),
    name("ixian 2", "app:1", "docker.io", "library/app", "1"),
    name("ixian 3", "team/app", "docker.io", "team/app", "latest"),
    name("ixian 4", "library/app", "docker.io", "library/app", "latest"),
    name("ixian 5", "docker.io/library/app", "docker.io", "library/app", "latest"),
    name("ixian 6", "docker.io/app", "docker.io", "library/app", "latest"),
    name("ixian 7", "registry.example.com/app", "registry.example.com", "app", "latest"),
    name("ixian 8", "registry.example.com/team/app:1", "registry.example.com", "team/app", "1"),
    name("ixian 9", "localhost:5000/x", "localhost:5000", "x", "latest"),
    name("ixian 10", "reg:5000/x", "reg:5000", "x", "latest"),
    name("ixian 11", "localhost/x", "localhost", "x", "latest"),
    name(
        "ixian 12",
        "123456789012.dkr.ecr.us-west-2.amazonaws.com/team/app:runtime-0a1b",
        "123456789012.dkr.ecr.us-west-2.amazonaws.com",
        "team/app",
        "runtime-0a1b",
    ),
    name("ixian 13", "[::1]:5000/x:1", "[::1]:5000", "x", "1"),
    // ICL took the first part for a registry, dropped folders, and the algorithm of a digest for a part of the name.
    name("ICL 1", "team/app:1", "docker.io", "team/app", "1"),
    name("ICL 2", "reg.io/team/app", "reg.io", "team/app", "latest"),
    Name { of: "ICL 3", given: "x@DIGEST", registry: "docker.io", repository: "library/x", tag: None, digest: true },
    name("ICL 4", "app", "docker.io", "library/app", "latest"),
    name("ICL 5", "reg.io:5000/app:1", "reg.io:5000", "app", "1"),
    name("ICL 6", "registry.localtest.me/a/b/c:v1", "registry.localtest.me", "a/b/c", "v1"),
    // dock took a namespace for a registry, and split digests at the wrong place.
    name("dock 1", "ns/img:1", "docker.io", "ns/img", "1"),
    name("dock 2", "reg:5000/ns/img", "reg:5000", "ns/img", "latest"),
    name("dock 3", "reg.io/img:1", "reg.io", "img", "1"),
    Name { of: "dock 4", given: "reg.io/ns/img@DIGEST", registry: "reg.io", repository: "ns/img", tag: None, digest: true },
    Name { of: "dock 5", given: "reg:5000/img:1@DIGEST", registry: "reg:5000", repository: "img", tag: Some("1"), digest: true },
];

#[test]
fn names_that_others_got_wrong() {
    for Name { of, given, registry, repository, tag, digest } in NAMES {
        let reference: Reference = given.replace("DIGEST", DIGEST).parse().unwrap_or_else(|e| panic!("{of}: {e}"));
        let got = (reference.registry(), reference.repository(), reference.tag(), reference.digest().map(ToString::to_string));
        assert_eq!(got, (registry, repository, tag, digest.then(|| DIGEST.to_owned())), "{of}: {given}");
        // Written out and read again, it is the same.
        assert_eq!(reference.to_string().parse(), Ok(reference), "{of}: {given}");
    }
}
