//! Odd command lines, run by instar under the name of the other and by qemu-img: outputs, exit status and the disks of the files that
//! changed agree.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

/// Files that every line finds.
const SETUP: &[&str] = &[
    "qemu-img create -q -f raw a.raw 1M",
    "qemu-io -f raw -c 'write -P 1 0 64k' a.raw",
    "qemu-img create -q -f qcow2 q.qcow2 4M",
    "qemu-io -f qcow2 -c 'write -P 2 0 64k' -c 'write -P 3 1M 128k' q.qcow2",
    "qemu-img create -q -f qcow2 -b q.qcow2 -F qcow2 o.qcow2",
    "qemu-io -f qcow2 -c 'write -P 4 64k 64k' -c 'write -z 1M 64k' o.qcow2",
    "qemu-img create -q -f qcow2 -b q.qcow2 -F qcow2 odd.qcow2 3146240",
    "qemu-img create -q -f qcow2 -o data_file=d.raw df.qcow2 1M",
    "qemu-io -f qcow2 -c 'write -P 2 0 64k' df.qcow2",
    "qemu-img convert -O qed q.qcow2 f.qed",
    "qemu-img create -q -f qcow2 -o extended_l2=on e.qcow2 1M",
    "qemu-io -f qcow2 -c 'write -P 1 0 4k' -c 'write -P 2 66k 2k' e.qcow2",
    "qemu-img create -q -f parallels p.parallels 8M",
    "truncate -s +3M p.parallels",
];

/// What is run, each in a directory of its own.
const LINES: &[&str] = &[
    "qemu-img",
    "qemu-img -T enable=foo,file=/dev/null info a.raw",
    "qemu-img info --outputt=json a.raw",
    "qemu-img info -Uf raw a.raw",
    "qemu-img info -f nbd a.raw",
    "qemu-img info -f null-co a.raw",
    "qemu-img info -f vvfat a.raw",
    "qemu-img info zeroinit:a.raw",
    "qemu-img info 'json:{'",
    "qemu-img info json:",
    "qemu-img info 'json:[]'",
    "qemu-img info \"json:{'driver':'qcow2','file':{'driver':'file','filename':'q.qcow2'}}\"",
    "qemu-img info --image-opts driver=qcow2,file.filename=q.qcow2,lazy-refcounts=foo",
    "qemu-img info --image-opts driver=qcow2,file.filename=q.qcow2,cache-size=foo",
    "qemu-img info --image-opts driver=qcow2,file.filename=q.qcow2,overlap-check=foo",
    "qemu-img info --image-opts driver=qcow2,file.filename=q.qcow2,discard=foo",
    "qemu-img info --image-opts driver=qcow2,file.filename=q.qcow2,detect-zeroes=unmap",
    "qemu-img info --image-opts driver=qcow2,file.filename=q.qcow2,detect-zeroes=foo",
    "qemu-img info --image-opts driver=qcow2,file.filename=q.qcow2,node-name=9n",
    "qemu-img info --image-opts driver=qcow2,file.filename=q.qcow2,file.locking=foo",
    "qemu-img info --image-opts driver=qcow2,file.filename=q.qcow2,file.aio=native",
    "qemu-img info --image-opts driver=qcow2,file.filename=q.qcow2,file.aio=foo",
    "qemu-img resize --image-opts driver=qcow2,file.filename=q.qcow2,read-only=on 5M",
    "qemu-img resize odd.qcow2 5M",
    "qemu-img amend -f qcow2 -o size=5M odd.qcow2",
    "qemu-img amend -f qcow2 -o size=2M q.qcow2",
    "qemu-img amend -f qcow2 -o size=2M odd.qcow2",
    "qemu-img info null-co://",
    "qemu-img info --output=json null-co://",
    "qemu-img info null-co://x",
    "qemu-img info --image-opts driver=null-co,size=1M,read-zeroes=on",
    "qemu-img info --image-opts driver=raw,file.driver=null-co,file.size=1M",
    "qemu-img info --image-opts driver=null-co,foo=1",
    "qemu-img map --output=json --image-opts driver=null-co,size=1M,read-zeroes=on",
    "qemu-img measure -O qcow2 null-co://",
    "qemu-img compare --image-opts driver=null-co,size=1M,read-zeroes=on driver=null-co,size=1M",
    "qemu-img check null-co://",
    "qemu-img convert -n --target-image-opts a.raw driver=null-co,size=1M",
    "qemu-img convert -n --target-image-opts a.raw driver=null-co,size=1k",
    "qemu-img map --output=json --image-opts driver=qcow2,file.filename=df.qcow2,data-file.filename=d.raw",
    "qemu-img map --output=json --image-opts driver=qcow2,file.filename=q.qcow2,data-file.driver=file,data-file.filename=d.raw",
    "qemu-img map --image-opts driver=qcow2,file.filename=df.qcow2,data-file.driver=file,data-file.filename=nosuch",
    "qemu-img bitmap --add df.qcow2 x; qemu-img info df.qcow2",
    "qemu-img amend -o lazy_refcounts=on df.qcow2; qemu-img check df.qcow2",
    "qemu-img snapshot -c x df.qcow2",
    "qemu-img rebase -u -b q.qcow2 -F qcow2 df.qcow2; qemu-img info df.qcow2",
    "qemu-img resize --image-opts driver=qcow2,file.filename=df.qcow2,data-file.filename=d.raw 2M; stat -c %s d.raw",
    "qemu-img resize --shrink --image-opts driver=qcow2,file.filename=df.qcow2,data-file.filename=d.raw 512k; stat -c %s d.raw",
    "qemu-img convert -n --target-image-opts a.raw driver=qcow2,file.filename=df.qcow2,data-file.filename=d.raw; \
     qemu-img map --output=json df.qcow2; qemu-img compare a.raw df.qcow2",
    "qemu-img convert -n -c --target-image-opts a.raw driver=qcow2,file.filename=df.qcow2,data-file.filename=d.raw",
    "qemu-img resize f.qed 5M; qemu-img info f.qed; qemu-img compare f.qed q.qcow2",
    "qemu-img resize f.qed 4M",
    "qemu-img resize --shrink f.qed 2M",
    "qemu-img resize --preallocation=full f.qed 5M",
    "qemu-img resize f.qed 5000001",
    "qemu-img resize f.qed 65T",
    "qemu-img resize -f raw a.raw +-512k",
    "qemu-img resize -f raw a.raw +-512",
    "qemu-img resize -f raw a.raw 2M -q; stat -c %s a.raw",
    "qemu-img resize a.raw -512k --shrink -f raw; stat -c %s a.raw",
    "qemu-img resize -f raw a.raw -- -512k",
    "qemu-img resize a.raw -q -512k",
    "qemu-img resize -f raw",
    "qemu-img resize a.raw -x",
    "qemu-img resize a.raw --help",
    "qemu-img resize --shrink --preallocation=x",
    "qemu-img rebase -u a.raw",
    "qemu-img rebase -F bogus -b nosuch a.raw",
    "qemu-img rebase -F bogus -b q.qcow2 nosuch",
    "qemu-img bitmap --add q.qcow2 b; qemu-img bitmap --add -g 1000 q.qcow2 b",
    "qemu-img map --output=json e.qcow2",
    "qemu-img compare -s e.qcow2 a.raw",
    "qemu-img compare -s q.qcow2 o.qcow2",
    "qemu-img commit o.qcow2; qemu-img compare q.qcow2 o.qcow2",
    "qemu-img create -q -f qcow2 t.qcow2 2M; qemu-img convert -n -O qcow2 a.raw t.qcow2; qemu-img map --output=json t.qcow2",
    "qemu-img check p.parallels",
    "qemu-img check -r all p.parallels",
    "qemu-img check -q --output=json q.qcow2",
    "qemu-img check -r leaks a.raw",
    "qemu-img compare -F bogus nosuch q.qcow2",
    "qemu-img compare -p a.raw q.qcow2",
    "qemu-img compare -p nosuch q.qcow2",
    "qemu-img compare -p -T x a.raw q.qcow2",
    "qemu-img compare -s -p q.qcow2 o.qcow2",
    "qemu-img commit -p nosuch",
    "qemu-img commit -p q.qcow2",
    // What is wrong is told in qemu-img's order.
    "qemu-img convert -C -c -S 4k nosuch n",
    "qemu-img convert -C --salvage q.qcow2 n",
    "qemu-img convert --skip-broken-bitmaps --target-is-zero q.qcow2 n",
    "qemu-img convert --image-opts -f raw",
    "qemu-img convert --image-opts -f raw -T x q.qcow2 n",
    "qemu-img convert -t x -c -O vdi q.qcow2 n",
    "qemu-img convert -t x -n q.qcow2 nosuch",
    "qemu-img convert -c -n -O vdi q.qcow2 nosuch",
    "qemu-img convert -l s --bitmaps q.qcow2 a.raw n",
    "qemu-img convert -O bogus --bitmaps q.qcow2 a.raw n",
    "qemu-img convert -B nosuch -n q.qcow2 a.raw n",
    "qemu-img convert --bitmaps -n q.qcow2 nosuch",
    "qemu-img convert -c -O vhdx --bitmaps f.qed n",
    "qemu-img convert -l s -O qcow2 f.qed n",
    "qemu-img convert -l s -O qcow2 a.raw n",
    "qemu-img measure -O bogus nosuch",
    "qemu-img measure -O vpc -l nosuch q.qcow2",
    "qemu-img measure -O qcow2 -o help nosuch",
    "qemu-img measure -f raw --size 1M",
    "qemu-img measure --object secret,id=s,data=x -O luks -o key-secret=s --size 513",
    "qemu-img rebase -b q.qcow2 a.raw",
    "qemu-img rebase -u -p -b q.qcow2 a.raw",
    "qemu-img rebase -b nosuch a.raw",
    "qemu-img rebase -u -b q.qcow2 -F qcow2 p.parallels",
    "qemu-img bitmap --add -g 100 f.qed b",
    "qemu-img info -f vhdx a.raw",
    "qemu-img create -f qcow2 -b a.raw -F vhdx n",
    ": > z; qemu-img dd -f raw skip=5 if=z of=n",
    "qemu-img convert -O vmdk -o subformat=twoGbMaxExtentSparse q.qcow2 v.vmdk; qemu-img info v-s001.vmdk; \
     qemu-img convert -n -O vmdk q.qcow2 v-s001.vmdk",
    "qemu-img convert -O qed a.raw z.qed; qemu-img rebase -f qed -b q.qcow2 -F qcow2 z.qed; qemu-img compare a.raw z.qed",
];

fn shell(dir: &Path, programs: &Path, line: &str) -> (Option<i32>, String, String) {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("bash")
        .args(["-c", line])
        .current_dir(dir)
        .env("PATH", format!("{}:{path}", programs.display()))
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        // What the file system makes of a file is not compared.
        text.lines()
            .filter(|line| !line.contains("disk size") && !line.contains("actual-size"))
            .fold(String::new(), |all, line| all + line + "\n")
    };
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn odd_lines() {
    if !support::can_run(true) {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let (files, bin, none) = (tmp.path().join("files"), tmp.path().join("bin"), tmp.path().join("none"));
    [&files, &bin, &none].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
    symlink(env!("CARGO_BIN_EXE_instar"), bin.join("qemu-img")).unwrap();
    for line in SETUP {
        let done = shell(&files, &none, line);
        assert_eq!(done.0, Some(0), "{line}: {done:?}");
    }
    let mut differences = Vec::new();
    for line in LINES {
        let both = [&bin, &none].map(|programs| {
            let dir = tempfile::tempdir_in(tmp.path()).unwrap();
            let here = dir.path().display();
            let copied = shell(&files, &none, &format!("cp --sparse=always * {here}/"));
            assert_eq!(copied.0, Some(0), "{copied:?}");
            shell(dir.path(), programs, line)
        });
        if both[0] != both[1] {
            differences.push(format!("{line}\n  instar   {:?}\n  qemu-img {:?}", both[0], both[1]));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}
