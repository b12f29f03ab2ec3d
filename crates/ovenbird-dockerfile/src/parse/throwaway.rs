#[test] fn throwaway_cases(){
 for e in std::fs::read_dir("/var/tmp/ob/df-cases").unwrap(){ let p=e.unwrap().path();
  let t=std::fs::read_to_string(&p).unwrap(); let r=crate::parse(&t);
  for d in &r.diagnostics { println!("{} {:?} {} | {:?} @ {:?}",p.display(),d.severity,d.message,d.help,t.get(d.span.start..d.span.end)); }
 } }
#[test] fn throwaway_dump(){ println!("{:#?}", crate::parse("# syntax=x\n# escape=`\nARG A=1\n# the base\nfrom --platform=$B debian:`\n12 as Base\nRUN --mount=type=cache,target=/x <<EOF cat `\n # c\n\n && echo 3<<-'X'\na\nEOF\n\tb\n\tX\nCOPY --from=x a <<E /c/\nq\nE\nONBUILD RUN <<F\nx\nF\nHEALTHCHECK --interval=5s CMD a")); }
