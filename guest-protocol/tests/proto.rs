//! `proto/instar.proto` against the Rust types: every field of one is a field of the other, of the same kind and number.

use std::fmt::Debug;
use std::path::Path;

use instar_guest_protocol::message as m;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, Kind, ReflectMessage, Value};

fn pool() -> DescriptorPool {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let files = protox::compile(["instar.proto"], [directory]).expect("the file is valid");
    DescriptorPool::from_file_descriptor_set(files).expect("the file is complete")
}

/// Fails unless every field is set, all the way down. Of a oneof one branch is enough.
fn assert_full(message: &DynamicMessage, path: &str) {
    assert_eq!(message.unknown_fields().count(), 0, "{path}: fields that only Rust knows");
    for field in message.descriptor().fields() {
        let path = format!("{path}.{}", field.name());
        if field.containing_oneof().is_some_and(|oneof| oneof.fields().len() > 1) && !message.has_field(&field) {
            continue;
        }
        assert!(message.has_field(&field), "{path} is not set: does Rust know it?");
        match message.get_field(&field).as_ref() {
            Value::Message(inner) => assert_full(inner, &path),
            Value::List(list) => {
                assert!(!list.is_empty(), "{path}");
                list.iter().filter_map(Value::as_message).for_each(|inner| assert_full(inner, &path));
            }
            Value::EnumNumber(number) => {
                let Kind::Enum(kind) = field.kind() else { panic!("{path}: not an enum") };
                assert!(kind.get_value(*number).is_some(), "{path}: {number}");
            }
            _ => {}
        }
    }
    for oneof in message.descriptor().oneofs() {
        assert!(oneof.fields().any(|field| message.has_field(&field)), "{path}.{} is empty", oneof.name());
    }
}

/// A message in which everything is set goes to the other side and back.
fn assert_same<T: Message + Default + PartialEq + Debug>(pool: &DescriptorPool, name: &str, full: &T) {
    let descriptor = pool.get_message_by_name(&format!("instar.{name}")).expect(name);
    let dynamic = DynamicMessage::decode(descriptor, full.encode_to_vec().as_slice()).expect(name);
    assert_full(&dynamic, name);
    assert_eq!(&T::decode(dynamic.encode_to_vec().as_slice()).expect(name), full, "{name}");
}

fn source() -> m::Source {
    let selector = m::SnapshotSelector { id: b"1".to_vec(), name: b"first".to_vec(), id_or_name: b"either".to_vec() };
    m::Source {
        device: 3,
        format: m::Format::Qcow2.into(),
        snapshot: Some(selector),
        strict: true,
        known_only: true,
        follow_probed: true,
        named_dmg: true,
        vhd_size: m::VhdSize::Current.into(),
        key: Some(key()),
        data_file_named: true,
        detached_header: true,
        below: vec![below()],
    }
}

fn below() -> m::Below {
    m::Below {
        choice: m::BackingChoice::Named.into(),
        format: m::Format::Qcow2.into(),
        key: Some(key()),
        vhd_size: m::VhdSize::Current.into(),
        known_only: true,
        follow_probed: true,
        named_dmg: true,
        data_file_named: true,
        detached_header: true,
    }
}

fn key() -> m::Key {
    m::Key { passphrase: b"secret".to_vec(), max_iterations: 1, max_memory: 2 }
}

fn luks_options() -> m::LuksOptions {
    m::LuksOptions {
        passphrase: b"secret".to_vec(),
        seed: vec![1],
        cipher_name: b"aes".to_vec(),
        cipher_mode: b"xts-plain64".to_vec(),
        hash: b"sha256".to_vec(),
        key_bytes: 64,
        slot_iterations: 1000,
        digest_iterations: 1000,
        detached: true,
    }
}

fn target() -> m::Target {
    m::Target {
        luks: Some(luks_options()),
        key: Some(key()),
        format: m::Format::Qcow2.into(),
        existing: true,
        qcow2: Some(m::Qcow2Options {
            version: Some(3),
            cluster_size: Some(65536),
            extended_l2: true,
            refcount_bits: Some(16),
            lazy_refcounts: true,
            zstd: true,
            data_file: Some(b"data".to_vec()),
            data_file_raw: true,
            aes_passphrase: Some(b"secret".to_vec()),
        }),
        preallocation: m::Preallocation::Full.into(),
        backing: Some(m::Backing { name: b"base".to_vec(), format_name: b"qcow2".to_vec(), image: Some(source()) }),
        qed: Some(m::QedOptions { cluster_size: Some(65536), table_size: Some(4) }),
        vdi: Some(m::VdiOptions { is_static: true, uuids: vec![7; 32] }),
        parallels: Some(m::ParallelsOptions { cluster_size: Some(1 << 20) }),
        vhdx: Some(m::VhdxOptions {
            block_size: Some(8 << 20),
            log_size: Some(1 << 20),
            fixed: true,
            block_state_zero: Some(true),
            creator: b"QEMU".to_vec(),
        }),
        seed: b"random".to_vec(),
        vmdk: Some(m::VmdkOptions {
            subformat: b"monolithicSparse".to_vec(),
            name: b"a.vmdk".to_vec(),
            cid: 1,
            adapter: b"ide".to_vec(),
            hardware_version: b"4".to_vec(),
            tools_version: b"1".to_vec(),
            zeroed_grain: true,
            filled: true,
        }),
        vhd: Some(m::VhdOptions { fixed: true, force_size: true, timestamp: 7 }),
        data_file_named: true,
        detached_header: true,
    }
}

fn failure() -> m::Failure {
    m::Failure {
        cause: m::Cause::InvalidField.into(),
        step: m::Step::Write.into(),
        device: Some(4),
        value: m::Field::L1Size as u64,
        value2: 9,
        text: b"name".to_vec(),
        os: 28,
        format: m::Format::Raw.into(),
    }
}

fn info() -> m::ImageInfo {
    let slot = m::LuksSlot { active: true, iterations: 1, key_offset: 2, stripes: 3 };
    let luks = m::LuksInfo {
        version: 1,
        cipher_name: b"aes".to_vec(),
        cipher_mode: b"xts-plain64".to_vec(),
        hash: b"sha256".to_vec(),
        uuid: b"uuid".to_vec(),
        key_bytes: 64,
        payload_offset: 4096,
        digest_iterations: 1000,
        slots: vec![slot],
        header_device: Some(2),
    };
    m::ImageInfo {
        luks: Some(luks.clone()),
        device: 1,
        vmdk: Some(m::VmdkInfo {
            cid: 1,
            parent_cid: 2,
            create_type: b"vmfs".to_vec(),
            extents: vec![m::VmdkExtent {
                compressed: true,
                virtual_size: 1,
                device: Some(2),
                cluster_size: Some(3),
                kind: b"FLAT".to_vec(),
            }],
        }),
        format: m::Format::Qcow2.into(),
        virtual_size: 2,
        cluster_size: Some(3),
        encrypted: true,
        dirty: true,
        backing_file: Some(b"base".to_vec()),
        backing_format: Some(b"raw".to_vec()),
        snapshots: vec![m::Snapshot {
            id: b"1".to_vec(),
            name: b"one".to_vec(),
            vm_state_size: 1,
            date_sec: 2,
            date_nsec: 3,
            vm_clock_nsec: 4,
            icount: Some(5),
            virtual_size: 6,
        }],
        qcow2: Some(m::Qcow2Info {
            version: 3,
            zstd: true,
            lazy_refcounts: true,
            bitmaps: vec![m::Bitmap { name: b"b0".to_vec(), granularity: 65536, in_use: true, auto: true }],
            refcount_bits: 16,
            aes: true,
            luks: Some(luks),
            data_file: Some(b"data".to_vec()),
            data_file_raw: true,
            corrupt: true,
            extended_l2: true,
            has_data_file: true,
        }),
        safety: Some(m::Safety {
            detected: m::Format::Gpt.into(),
            also: vec![m::Format::Iso.into()],
            references: vec![m::Reference { role: m::FileRole::Backing.into(), name: b"base".to_vec() }],
            incompatible_features: 7,
        }),
    }
}

#[test]
fn requests_are_the_same() {
    use m::request::Operation;
    let pool = pool();
    let operations = [
        Operation::Info(m::InfoRequest { image: source(), chain: true, safety: true }),
        Operation::Convert(m::ConvertRequest {
            sources: vec![source()],
            target: target(),
            compress: true,
            sparse_bytes: 4096,
            target_is_zero: true,
            salvage: true,
            bitmaps: true,
            skip_broken_bitmaps: true,
            threads: 2,
            progress: true,
            rate_limit: 1,
            flush: true,
            blocks: Some(m::Blocks { size: 512, count: Some(1), skip: 2 }),
        }),
        Operation::Create(m::CreateRequest { target: target(), size: Some(512) }),
        Operation::Map(m::MapRequest { image: source(), start: 1, max_length: Some(2) }),
        Operation::Compare(m::CompareRequest {
            first: source(),
            second: source(),
            strict: true,
            threads: 2,
            progress: true,
        }),
        Operation::Measure(m::MeasureRequest { image: source(), cluster_size: 65536 }),
        Operation::Check(m::CheckRequest { image: source(), leaks: true, corruptions: true }),
        Operation::Snapshot(m::SnapshotRequest {
            image: source(),
            action: m::SnapshotAction::Apply.into(),
            name: b"one".to_vec(),
            date_sec: 1,
            date_nsec: 2,
        }),
        Operation::Bitmap(m::BitmapRequest {
            image: source(),
            name: b"b0".to_vec(),
            actions: vec![m::BitmapAction {
                verb: m::BitmapVerb::Merge.into(),
                granularity: Some(512),
                source: b"b1".to_vec(),
            }],
            source: Some(source()),
        }),
        Operation::Amend(m::AmendRequest {
            image: source(),
            options: Some(m::AmendOptions {
                version: Some(2),
                refcount_bits: Some(1),
                lazy_refcounts: Some(true),
                data_file: Some(b"data".to_vec()),
                data_file_raw: Some(true),
                backing_file: Some(b"base".to_vec()),
                backing_format: Some(b"raw".to_vec()),
                size: Some(512),
                encryption: true,
                keys: Some(m::KeyChange {
                    activate: true,
                    new_passphrase: b"new".to_vec(),
                    old_passphrase: Some(b"old".to_vec()),
                    slot: Some(1),
                    iterations: 1000,
                    seed: vec![1],
                    force: true,
                }),
            }),
            progress: true,
        }),
        Operation::Resize(m::ResizeRequest {
            image: source(),
            change: m::SizeChange::Grow.into(),
            amount: 512,
            shrink: true,
            preallocation: m::Preallocation::Full.into(),
        }),
        Operation::Rebase(m::RebaseRequest {
            image: source(),
            name: b"base".to_vec(),
            format_name: b"raw".to_vec(),
            format: m::Format::Raw.into(),
            only_name: true,
            compress: true,
            flush: true,
            threads: 2,
            progress: true,
            new_below: vec![below()],
        }),
        Operation::Commit(m::CommitRequest {
            image: source(),
            keep: true,
            flush: true,
            threads: 2,
            progress: true,
            rate_limit: 1,
            seed: vec![1; 16],
        }),
        Operation::Bench(m::BenchRequest {
            image: source(),
            count: 1,
            depth: 2,
            offset: 3,
            size: 4,
            step: 5,
            pattern: Some(6),
            flush_interval: 7,
            flush: true,
            seed: vec![2; 16],
        }),
    ];
    for operation in operations {
        assert_same(&pool, "Request", &m::Request { operation: Some(operation) });
    }
}

fn numbers() -> m::CheckNumbers {
    m::CheckNumbers {
        corruptions: 1,
        corruptions_fixed: 2,
        leaks: 3,
        leaks_fixed: 4,
        check_errors: 5,
        image_end: Some(6),
        total_clusters: 7,
        allocated_clusters: 8,
        fragmented_clusters: 9,
        compressed_clusters: 10,
    }
}

#[test]
fn calls_and_answers_are_the_same() {
    use m::call::Kind as Call;
    use m::reply::Result as Reply;
    let pool = pool();
    let open = m::OpenFile {
        role: m::FileRole::TargetData.into(),
        referrer: 1,
        name: b"name".to_vec(),
        size: 2,
        writable: true,
        format: m::Format::Raw.into(),
    };
    let progress = m::Progress { done: 1, total: 2 };
    let done = |result| Call::Done(m::Reply { result: Some(result) });
    let calls = [
        Call::Open(open),
        Call::Progress(progress.clone()),
        Call::Pace(progress),
        Call::Warning(failure()),
        done(Reply::Failure(failure())),
        done(Reply::Info(m::InfoReply { images: vec![info()] })),
        done(Reply::Convert(m::ConvertReply { virtual_size: 1, copied: 2, transformed: 3, skipped_all: true })),
        Call::Runs(m::MapRuns {
            runs: vec![m::MapRun {
                start: 1,
                length: 2,
                depth: 3,
                present: true,
                zero: true,
                data: true,
                compressed: true,
                device: Some(1),
                offset: 5,
            }],
        }),
        done(Reply::Create(m::CreateReply { virtual_size: 1 })),
        Call::Findings(m::CheckFindings {
            findings: vec![m::CheckFinding {
                kind: m::FindingKind::Count.into(),
                repaired: true,
                first: 1,
                second: 2,
                third: 3,
            }],
        }),
        done(Reply::Check(m::CheckReply {
            format: m::Format::Qcow2.into(),
            supported: true,
            numbers: Some(numbers()),
            repaired: Some(numbers()),
            refused: true,
        })),
        done(Reply::Map(m::MapReply { virtual_size: 1 })),
        done(Reply::Compare(m::CompareReply { first_size: 1, second_size: 2, mismatch: Some(3), allocation: true })),
        done(Reply::Measure(m::MeasureReply {
            virtual_size: 1,
            required: 2,
            has_bitmaps: true,
            bitmaps: info().qcow2.unwrap_or_default().bitmaps,
            format: m::Format::Qcow2.into(),
        })),
        done(Reply::Edit(m::EditReply { format: m::Format::Raw.into(), snapshots: info().snapshots })),
    ];
    for call in calls {
        assert_same(&pool, "Call", &m::Call { kind: Some(call) });
    }
    assert_same(&pool, "OpenAnswer", &m::OpenAnswer { granted: true, device: 1, len: 2, flags: 3, allocated: 4 });
}

/// The same numbers, under the same names.
fn assert_enum<T: TryFrom<i32> + Debug>(pool: &DescriptorPool, name: &str) {
    let kind = pool.get_enum_by_name(&format!("instar.{name}")).expect(name);
    for number in 0..1000 {
        let rust = T::try_from(number).ok().map(|variant| screaming(&format!("{name}{variant:?}")));
        let proto = kind.get_value(number).map(|value| value.name().to_owned());
        assert_eq!(rust, proto, "{name} {number}");
    }
}

fn screaming(camel: &str) -> String {
    let mut text = String::new();
    let mut before = 'A';
    for letter in camel.chars() {
        if letter.is_uppercase() && !before.is_uppercase() {
            text.push('_');
        }
        text.push(letter.to_ascii_uppercase());
        before = letter;
    }
    text
}

#[test]
fn enums_are_the_same() {
    let pool = pool();
    assert_enum::<m::Format>(&pool, "Format");
    assert_enum::<m::VhdSize>(&pool, "VhdSize");
    assert_enum::<m::BackingChoice>(&pool, "BackingChoice");
    assert_enum::<m::Preallocation>(&pool, "Preallocation");
    assert_enum::<m::FileRole>(&pool, "FileRole");
    assert_enum::<m::Step>(&pool, "Step");
    assert_enum::<m::Cause>(&pool, "Cause");
    assert_enum::<m::Field>(&pool, "Field");
    assert_enum::<m::BitmapFault>(&pool, "BitmapFault");
    assert_enum::<m::SnapshotAction>(&pool, "SnapshotAction");
    assert_enum::<m::BitmapVerb>(&pool, "BitmapVerb");
    assert_enum::<m::LuksFault>(&pool, "LuksFault");
    assert_enum::<m::BitmapRefusal>(&pool, "BitmapRefusal");
    assert_enum::<m::AmendRefusal>(&pool, "AmendRefusal");
    assert_enum::<m::SizeChange>(&pool, "SizeChange");
    assert_enum::<m::ResizeRefusal>(&pool, "ResizeRefusal");
    assert_enum::<m::OptionError>(&pool, "OptionError");
    assert_enum::<m::FindingKind>(&pool, "FindingKind");
    assert_enum::<m::FormatFault>(&pool, "FormatFault");
    assert_enum::<m::VmdkFault>(&pool, "VmdkFault");
    assert_eq!(pool.all_enums().count(), 20, "an enum without a check");
}
