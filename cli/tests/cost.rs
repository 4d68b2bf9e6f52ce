//! What commands cost follows what is allocated. Counted in exits of the virtual machine, which no load of the host changes.

mod support;

use std::path::Path;

use support::{can_run, expect_success, instar, qemu_img, qemu_io};

/// Exits of a command that succeeds.
fn exits(dir: &Path, args: &[&str]) -> u64 {
    let all = [&["--stats=json"], args].concat();
    let output = instar(dir, &all);
    expect_success(&output, &format!("{args:?}"));
    let stats = String::from_utf8(output.stderr).unwrap();
    let digits = stats.split("\"exits\":").nth(1).expect("statistics").trim_start();
    digits.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

#[test]
fn scattered_clusters_are_served_together() {
    const CLUSTERS: u64 = 1000;
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    expect_success(&qemu_img(dir, &["create", "-f", "qcow2", "sparse.qcow2", "1T"]), "create");
    let at = |cluster: u64| cluster * ((1 << 40) / CLUSTERS) / 65536 * 65536;
    let writes: Vec<_> = (0..CLUSTERS).map(|n| format!("write -P {} {} 4k", n % 255 + 1, at(n))).collect();
    qemu_io(dir, "sparse.qcow2", &writes);
    std::fs::copy(dir.join("sparse.qcow2"), dir.join("copy.qcow2")).unwrap();
    // Nearly each cluster has an L2 table of its own. Tables are read ahead, several clusters are read and written in one turn: with one
    // exit for each it would be between 1000 (map) and 5000 (convert).
    let allowed = CLUSTERS * 2 / 3;
    for args in [
        &["map", "--output=json", "sparse.qcow2"][..],
        &["check", "sparse.qcow2"],
        &["measure", "-O", "raw", "sparse.qcow2"],
        &["compare", "sparse.qcow2", "copy.qcow2"],
        &["convert", "-O", "qcow2", "sparse.qcow2", "out.qcow2"],
        &["convert", "-O", "raw", "sparse.qcow2", "out.raw"],
    ] {
        let exits = exits(dir, args);
        assert!(exits <= allowed, "{args:?}: {exits} exits for {CLUSTERS} clusters");
    }
    expect_success(&qemu_img(dir, &["check", "out.qcow2"]), "check");
    expect_success(&qemu_img(dir, &["compare", "sparse.qcow2", "out.qcow2"]), "compare");
}

#[test]
fn an_empty_exbibyte_costs_nothing() {
    if !can_run(true) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // The largest disk that fits an L1 table: with clusters of 2 MiB.
    expect_success(
        &instar(dir, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "huge.qcow2", "1E"]),
        "create",
    );
    for args in [
        &["info", "huge.qcow2"][..],
        &["map", "--output=json", "huge.qcow2"],
        &["check", "huge.qcow2"],
        &["measure", "-O", "qcow2", "huge.qcow2"],
        &["compare", "huge.qcow2", "huge.qcow2"],
    ] {
        let exits = exits(dir, args);
        assert!(exits <= 1100, "{args:?}: {exits} exits");
    }
}
