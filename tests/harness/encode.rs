//! Cases of encode and decode: dense rows to stored rows and back, bit for bit with the reference.

use crate::pages::{DevicePages, Layout, Pages, RowFormat};
use crate::{Lab, reference_dtype};
use kvlar::{Buffer, Dtype, EncodeShape};
use kvlar_reference::testing::Rng;

/// Two sequences of some heads.
#[derive(Clone, Debug)]
pub struct EncodeCase {
    pub stored: RowFormat,
    pub dtype: Dtype,
    pub layout: Layout,
    pub dim: usize,
    pub rows: usize,
}

impl EncodeCase {
    pub fn shape(&self, heads: usize) -> EncodeShape {
        EncodeShape { format: self.stored.format, dtype: self.dtype, seqs: 2, heads, rows: self.rows, dim: self.dim }
    }

    /// Encodes, compares the bytes, decodes to each type, compares the values.
    pub fn check(&self, lab: &Lab, values: &[f32]) {
        let heads = values.len() / (2 * self.rows * self.dim);
        let (stored, dim) = (&self.stored, self.dim);
        let plan = self.shape(heads).plan(&lab.device).expect("a plan");
        let pages = Pages::new(&mut Rng::new(3), self.layout, 2, heads, self.rows, &[self.rows; 2]);
        let on_device = DevicePages::upload(lab, &pages);
        let x = lab.upload_as(values, self.dtype);
        let mut pool = lab.poisoned(pages.pool_bytes(stored, dim));
        let rows = on_device.rows();
        let scales = stored.upload(lab);
        let scales = scales.as_ref().map(Buffer::view);
        plan.encode(&lab.stream, x.view(), &rows, &pages.pool(pool.view_mut(), stored, dim), scales).expect("encode");
        let bytes: Vec<u8> = lab.download(&pool);

        let rounded = reference_dtype(self.dtype).round_all(values);
        let mut expected = vec![0xffu8; bytes.len()];
        let mut decoded = Vec::new();
        for (i, head) in rounded.chunks(self.rows * dim).enumerate() {
            decoded.extend(pages.store_all(&mut expected, (i / heads, i % heads), head, dim, stored));
        }
        if let Some(i) = (0..bytes.len()).find(|&i| bytes[i] != expected[i]) {
            // A NaN has many patterns; only its being one is defined.
            let nan = |x: &[u8]| {
                half::f16::from_le_bytes([x[i & !1], x[i | 1]]).is_nan()
                    || half::bf16::from_le_bytes([x[i & !1], x[i | 1]]).is_nan()
            };
            assert!(nan(&bytes) && nan(&expected), "{stored:?} d={dim}: byte {i} is {} instead of {}", bytes[i], expected[i]);
        }
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            let mut out = lab.poisoned(values.len() * dtype.bytes());
            let pool = pages.pool(pool.view(), stored, dim);
            plan.decode_as(&lab.stream, &rows, &pool, scales, dtype, &mut out.view_mut()).expect("decode");
            let expected = reference_dtype(dtype).round_all(&decoded);
            for (i, (a, e)) in lab.download_as(&out, dtype).iter().zip(&expected).enumerate() {
                assert!(
                    a.to_bits() == e.to_bits() || (a.is_nan() && e.is_nan()),
                    "{stored:?} d={dim}: value {i} as {dtype:?} is {a} instead of {e}"
                );
            }
        }
    }
}
