//! The anti-forensic splitter (specification, chapter 2.4): a key is kept as so many stripes that losing any sector of them makes
//! it unreadable.

use zeroize::Zeroizing;

use crate::hash::Hash;

/// Puts stripes together: `material` holds them one behind the other, each as long as `key`.
pub(crate) fn merge(hash: Hash, material: &[u8], key: &mut [u8]) {
    let len = key.len();
    key.fill(0);
    let mut stripes = material.chunks_exact(len).peekable();
    while let Some(stripe) = stripes.next() {
        xor(key, stripe);
        if stripes.peek().is_some() {
            diffuse(hash, key);
        }
    }
}

/// Completes `material`, whose stripes are random, so that [`merge`] gives `key`: only the last stripe is changed.
pub(crate) fn split(hash: Hash, key: &[u8], material: &mut [u8]) {
    let Some(last_at) = material.len().checked_sub(key.len()) else { return };
    let (random, last) = material.split_at_mut(last_at);
    let mut state = Zeroizing::new(alloc::vec![0; key.len()]);
    for stripe in random.chunks_exact(key.len()) {
        xor(&mut state, stripe);
        diffuse(hash, &mut state);
    }
    last.copy_from_slice(key);
    xor(last, &state);
}

fn xor(state: &mut [u8], with: &[u8]) {
    state.iter_mut().zip(with).for_each(|(byte, with)| *byte ^= with);
}

/// Replaces each block by the hash of its number and itself.
fn diffuse(hash: Hash, state: &mut [u8]) {
    for (number, block) in (0_u32..).zip(state.chunks_mut(hash.digest_len())) {
        let digest = Zeroizing::new(hash.digest(&[&number.to_be_bytes(), block]));
        block.copy_from_slice(&digest[..block.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_split_comes_together() {
        for (hash, len) in [(Hash::Sha1, 16), (Hash::Sha1, 64), (Hash::Sha256, 32), (Hash::Sha512, 24)] {
            let key: alloc::vec::Vec<u8> = (0..len as u8).collect();
            let mut material: alloc::vec::Vec<u8> = (0..len * 50).map(|at| (at * 7 % 251) as u8).collect();
            split(hash, &key, &mut material);
            let mut merged = alloc::vec![0; len];
            merge(hash, &material, &mut merged);
            assert_eq!(merged, key);
            material[3] ^= 1;
            merge(hash, &material, &mut merged);
            assert_ne!(merged, key);
        }
    }

    #[test]
    fn a_single_stripe_is_the_key() {
        let mut material = [0; 16];
        split(Hash::Sha1, &[7; 16], &mut material);
        assert_eq!(material, [7; 16]);
    }
}
