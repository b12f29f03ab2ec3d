use super::*;

fn shown(value: &str) -> String {
    match parse(value) {
        Ok(mount) => format!("{mount:?}"),
        Err(error) => format!("error: {error}"),
    }
}

#[test]
fn every_type() {
    let rows: Vec<String> = [
        "target=/a",
        "type=bind,target=/a",
        "type=BIND,TARGET=/a",
        "type=bind,dst=/a,src=b,from=stage,rw",
        "type=bind,destination=.,source=/b,readwrite=true",
        "type=bind,target=/a,rw=false",
        "type=bind,target=/a,ro",
        "type=bind,target=/a,readonly=false",
        "type=bind,target=/a,ro=true,rw",
        "target=/a,type=cache",
        "type=cache,target=/a,id=c,from=x,source=/y,sharing=locked,ro,mode=0755,uid=1000,gid=100",
        "type=cache,target=/a,sharing=PRIVATE",
        "type=cache,target=/a,readwrite",
        "type=tmpfs,target=/a",
        "type=tmpfs,target=/a,size=64",
        "type=tmpfs,target=/a,size=64m",
        "type=tmpfs,target=/a,size=1.5GiB",
        "type=secret,id=s",
        "type=secret,target=/run/x/name",
        "type=secret,src=s,target=/a",
        "type=secret,id=s,env=TOKEN,required,mode=0400,uid=0,gid=0",
        "type=secret,id=s,required=false",
        "type=secret,id=s,readonly",
        "type=tmpfs,target=/a,rw",
        "type=ssh,ro=true",
        "type=ssh",
        "type=ssh,id=k,target=/a,required=true,mode=600,uid=1,gid=2",
        "type=bind,\"target=/a,b\"",
        "type=bind,\"target=/a\"\"b\"",
        "type=bind,target=/a=b",
    ]
    .into_iter()
    .map(|value| format!("{value}\n    {}\n", shown(value)))
    .collect();
    insta::assert_snapshot!(rows.concat());
}

#[test]
fn every_refusal() {
    let mut rows = Vec::new();
    for value in [
        "",
        "type=bind",
        "type=cache",
        "type=tmpfs",
        "type=secret",
        "type=secret,target=/",
        "type=secret,id=a,source=b",
        "type=secert,id=a",
        "type=nothing",
        "type",
        "type=bind,type=cache,target=/a",
        "target=/a,dst=/b",
        "target=/a,ro,readonly",
        "taget=/a",
        "target",
        "target=/a,",
        "target=/a,size=1m",
        "target=/a,id=x",
        "target=/a,mode=0755",
        "target=/a,uid=1",
        "target=/a,sharing=locked",
        "target=/a,required",
        "target=/a,env=X",
        "type=cache,target=/a,required",
        "type=cache,target=/a,size=1m",
        "type=cache,target=/a,sharing=lock",
        "type=cache,target=/a,sharing=exclusive",
        "type=cache,target=/a,mode=0888",
        "type=cache,target=/a,mode=rwx",
        "type=cache,target=/a,uid=-1",
        "type=cache,target=/a,uid=+1",
        "type=cache,target=/a,gid=99999999999",
        "type=cache,target=/a,ro=maybe",
        "type=tmpfs,target=/a,size=big",
        "type=tmpfs,target=/a,size=1x",
        "type=tmpfs,target=/a,size=-1",
        "type=tmpfs,target=/a,size=99999999999p",
        "type=tmpfs,target=/a,from=x",
        "type=secret,id=a,from=x",
        "type=secret,id=a,sharing=locked",
        "type=secret,env=TOKEN",
        "type=secret,id=a,rw",
        "type=tmpfs,target=/a,ro",
        "type=ssh,readonly=false",
        "target=/a,,ro",
        "type=ssh,source=x",
        "type=ssh,env=X",
        "type=bind,\"target=/a",
        "type=bind,\"target=/a\"b",
        "type=bind,target=\"/a\"",
    ] {
        let text = shown(value);
        assert!(text.starts_with("error: "), "{value} was taken: {text}");
        rows.push(format!("{value}\n    {text}\n"));
    }
    insta::assert_snapshot!(rows.concat());
}

#[test]
fn values_are_expanded_one_by_one() {
    let mut expand = |raw: &str| Ok(raw.replace("$x", "/a,ro=bad"));
    let mount = parse_expanding("type=cache,target=$x,from=$x", &mut expand);
    let expected = MountKind::Cache {
        id: None,
        from: Some("$x".to_owned()),
        source: None,
        sharing: Sharing::Shared,
        read_only: false,
        mode: None,
        uid: None,
        gid: None,
    };
    assert_eq!(mount, Ok(RunMount { kind: expected, target: Some("/a,ro=bad".to_owned()) }));
    let refuse = ExpandError::BadSubstitution { word: "${}".to_owned() };
    let error = parse_expanding("target=${}", &mut |_| Err(refuse.clone()));
    assert_eq!(error, Err(MountError::Expand { key: "target".to_owned(), source: refuse }));
}

#[test]
fn sizes() {
    for (text, expect) in [
        ("0", Some(0)),
        ("1", Some(1)),
        ("1b", Some(1)),
        ("1k", Some(1 << 10)),
        ("1KB", Some(1 << 10)),
        ("1KiB", Some(1 << 10)),
        ("2m", Some(2 << 20)),
        ("3 g", Some(3 << 30)),
        ("1t", Some(1 << 40)),
        ("1p", Some(1 << 50)),
        ("0.5k", Some(512)),
        ("", None),
        ("k", None),
        ("1kk", None),
        ("1ib", None),
        ("1.2.3", None),
        ("1e3", None),
        (" 1", None),
        ("16777216p", None),
    ] {
        assert_eq!(bytes(text), expect, "{text:?}");
    }
}
